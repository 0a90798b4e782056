#!/usr/bin/env bash
# FIPO on SmolLM2-135M-Instruct and small arithmetic, one GPU: a first run on a new machine.
#
#   bash examples/recipes/smollm2-1gpu.sh                             a few minutes
#   bash examples/recipes/smollm2-1gpu.sh --slurm --time 24:00:00     submits it; --dry-run shows the job
#   bash examples/recipes/smollm2-1gpu.sh plan                        memory by part, as below
#   bash examples/recipes/smollm2-1gpu.sh --print-config              every setting, and what a start would refuse
#
# Further options of the launcher may follow, and after -- further flags of the program.
#
# The model: python tools/prepare_smollm2.py --save runs/models/SmolLM2-135M-Instruct
#
# Why this layout. 135 million parameters fit any GPU: nothing is cut, and all of it may stay there while the engine
# generates (--no-offload-trainer), which saves moving it. The engine needs little of the rest for answers of 8 tokens.
#
# `plan` says (nothing of this was run on a GPU):
#
#   1 GPU of 16 GiB: DP 1, 0.13 billion parameters a rank, 4096 tokens a micro-batch, transformer_engine layers
#   GiB             training  syncing  generating
#   parameters          0.25     0.25        0.25
#   gradients           0.50     0.50        0.50
#   optimizer           1.50     1.50        1.50
#   activations         2.89
#   logits              0.09
#   working memory      0.16
#   engine weights               0.25        0.25
#   KV cache                                 4.25
#   engine runtime                           3.64
#   weight buckets               0.33
#   reserve             2.00     2.00        2.00
#   all                 7.40     4.84       12.40
#   training   |PGGOOOOOOAAAAAAAAAAAAWxxxxxxxx..................................|
#   syncing    |PGGOOOOOOEBxxxxxxxx.............................................|
#   generating |PGGOOOOOOEKKKKKKKKKKKKKKKKKRRRRRRRRRRRRRRRxxxxxxxx..............|
#   P parameters, G gradients, O optimizer, A activations, L logits, W working memory, E engine weights, K KV cache, R
#   engine runtime, B weight buckets, x reserve; . free
#   an engine's cache holds 198038 tokens, 2750 sequences of the longest; a save takes 2 GiB of main memory; bubble 0%,
#   communication 0% (nominal)
#   fits
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python}
MODEL=${MODEL:-runs/models/SmolLM2-135M-Instruct}
RUN=${RUN:-runs/smollm2-1gpu}
NODES=1
GPU_MEMORY_GIB=16
GPUS_PER_NODE=1

SLURM_ARGS=(--no-requeue) # nothing is saved, so a job that was requeued would begin anew

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 1
)
TRAINING_ARGS=(
    --bf16
    --train-iters 12
    --lr 1e-5
    --lr-warmup-iters 0
    --weight-decay 0.0
    --max-tokens-per-micro-batch 4096
    --no-offload-trainer
)
FIPO_ARGS=(
    --algorithm fipo
    --rollout-batch-size 8
    --n-samples-per-prompt 8
    --num-updates-per-rollout 4
    --no-overlong-penalty
)
ROLLOUT_ARGS=(
    --rollout-max-prompt-len 64
    --rollout-max-response-len 8
    --sglang-mem-fraction-static 0.3
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
