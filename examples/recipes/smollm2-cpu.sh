#!/usr/bin/env bash
# FIPO on SmolLM2-135M-Instruct and small arithmetic on two CPU cores: the quickstart's run as a script to edit.
#
#   bash examples/recipes/smollm2-cpu.sh                             a few minutes
#   bash examples/recipes/smollm2-cpu.sh --slurm --time 24:00:00     submits it; --dry-run shows the job
#   bash examples/recipes/smollm2-cpu.sh plan                        memory by part, as below
#   bash examples/recipes/smollm2-cpu.sh --print-config              every setting, and what a start would refuse
#
# Further options of the launcher may follow, and after -- further flags of the program.
#
# Once, in this order, for the environment and the model:
#     bash examples/setup_env.sh
#     .venv/bin/python tools/prepare_smollm2.py --save runs/models/SmolLM2-135M-Instruct
#
# Why this layout. Two ranks of one thread each, PP 2: a rank holds half of the layers and sends one activation, where TP 2
# would exchange activations twice in every layer over gloo. Vocabulary and embedding are tied, so both stages hold them.
# The engine is a process beside them; nothing leaves main memory between turns.
#
# `plan` says:
#
#   2 ranks of 5 GiB: PP 2 DP 1, 0.08 billion parameters a rank, 256 tokens a micro-batch, local layers
#   GiB             training  syncing  generating
#   parameters          0.15     0.15        0.15
#   gradients           0.30     0.30        0.30
#   optimizer           0.91     0.91        0.91
#   activations         0.25
#   working memory      0.01
#   engine weights      0.13     0.13        0.13
#   KV cache            0.11     0.11        0.11
#   weight buckets               0.33
#   reserve             2.25     2.25        2.25
#   all                 4.11     4.18        3.85
#   training   |PPGGGGOOOOOOOOOOOAAAAEKKxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...........|
#   syncing    |PPGGGGOOOOOOOOOOOEEKBBBBBxxxxxxxxxxxxxxxxxxxxxxxxxxxxx..........|
#   generating |PPGGGGOOOOOOOOOOOEEKxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...............|
#   P parameters, G gradients, O optimizer, A activations, W working memory, E engine weights, K KV cache, B weight
#   buckets, x reserve; . free
#   pipeline ranks in training: 4.1, 4.1; shown is rank 0
#   an engine's cache holds 10240 tokens, 142 sequences of the longest; bubble 31%, communication 0% (nominal)
#   fits
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
MODEL=${MODEL:-runs/models/SmolLM2-135M-Instruct}
RUN=${RUN:-runs/smollm2-cpu}
NODES=1
GPU_MEMORY_GIB=5
GPUS_PER_NODE=2 # ranks

export OMP_NUM_THREADS=1     # two spinning threads per process are several times slower on a busy machine
export TORCHDYNAMO_DISABLE=1 # nothing here is compiled
# glibc hands freed memory back to the kernel, and every tensor would fault its pages in anew (docs/performance.md)
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=67108864

SLURM_ARGS=(--no-requeue) # nothing is saved, so a job that was requeued would begin anew

MODEL_PARALLEL_ARGS=(
    --device cpu
    --pipeline-model-parallel-size 2
)
TRAINING_ARGS=(
    --bf16
    --train-iters 12
    --lr 1e-5
    --lr-warmup-iters 0
    --weight-decay 0.0
    --max-tokens-per-micro-batch 256
)
FIPO_ARGS=(
    --algorithm fipo
    --rollout-batch-size 8
    --n-samples-per-prompt 8
    --num-updates-per-rollout 4
    --no-overlong-penalty
)
ROLLOUT_ARGS=(
    --rollout-num-engines 1
    --rollout-max-prompt-len 64
    --rollout-max-response-len 8
)
DATA_ARGS=(
    --task small_arithmetic # What is 13 - 4?
    --num-eval-problems 96
)
EVAL_AND_LOGGING_ARGS=(
    --eval-interval 5
    --output-dir "$RUN"
    --export-hf "$RUN/model"
)

source examples/recipes/start.bash
