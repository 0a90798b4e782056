#!/usr/bin/env bash
# The paper's 32B run: FIPO on Qwen2.5-32B, 16 nodes of 8 GPUs. docs/reproduce.md has models and data.
#
#   bash examples/recipes/qwen2.5-32b-16x8.sh                             on every node, with NODE_RANK and MASTER_ADDR set
#   bash examples/recipes/qwen2.5-32b-16x8.sh --slurm --time 24:00:00     submits it; --dry-run shows the job
#   bash examples/recipes/qwen2.5-32b-16x8.sh plan                        memory by part, as below
#   bash examples/recipes/qwen2.5-32b-16x8.sh --print-config              every setting, and what a start would refuse
#
# Further options of the launcher may follow, and after -- further flags of the program.
#
# Why this layout. TP 8 stays inside a node and gives each rank one of the 8 key-value heads. A response has up to 20480
# tokens: CP 2 halves what a rank keeps of the longest sequence, so that nothing is recomputed. PP 2 halves parameters and
# gradients, which move to main memory and back at every step. What is left, 4, is DP; the optimizer is sharded over
# DP x CP = 8. `tools/plan.py` without the layout's flags finds layouts that are nominally up to a tenth faster (TP 2 or 4, PP 8
# or 16); they leave 2 to 6 GiB of memory. 4 GPUs an engine: 28 of the longest responses at once each.
#
# `plan` says (nothing of this was run on a GPU):
#
#   128 GPUs of 80 GiB: TP 8 PP 2 CP 2 DP 4, 2.05 billion parameters a rank, 11264 tokens a micro-batch,
#   transformer_engine layers
#   GiB             training  syncing  generating
#   parameters          3.81     3.81
#   gradients           7.63
#   optimizer           2.86
#   activations        30.44
#   working memory      0.36
#   engine weights              15.26       15.26
#   KV cache                                38.64
#   engine runtime                          14.00
#   weight buckets               1.25
#   reserve             6.00     6.00        6.00
#   all                51.10    26.32       73.90
#   training   |PPPGGGGGGOOAAAAAAAAAAAAAAAAAAAAAAAAAxxxxx.......................|
#   syncing    |PPPEEEEEEEEEEEEBxxxxx...........................................|
#   generating |EEEEEEEEEEEEKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKRRRRRRRRRRRxxxxx.....|
#   P parameters, G gradients, O optimizer, A activations, W working memory, E engine weights, K KV cache, R engine
#   runtime, B weight buckets, x reserve; . free
#   pipeline ranks in training: 51.1, 36.4; shown is rank 0
#   an engine's cache holds 633113 tokens, 28 sequences of the longest; 53 GiB move to a node's main memory; a save takes
#   53 GiB of main memory; bubble 1%, communication 17% (nominal)
#   fits
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python}
MODEL=${MODEL:-models/Qwen2.5-32B}
RUN=${RUN:-runs/fipo-32b}
NODES=16
GPU_MEMORY_GIB=80
GPUS_PER_NODE=8

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 8
    --sequence-parallel
    --pipeline-model-parallel-size 2
    --context-parallel-size 2
)
TRAINING_ARGS=(
    --bf16
    --train-iters 500
    --max-tokens-per-micro-batch 11264 # x CP 2 = a prompt of 2048 and a response of 20480
)
FIPO_ARGS=(
    --preset fipo-qwen2.5-32b # the paper's table; a flag here wins over it
)
ROLLOUT_ARGS=(
    --rollout-num-gpus-per-engine 4
    --rollout-request-timeout-s 14400 # for a generation batch of 2048 x 16 responses
    --sglang-mem-fraction-static 0.7
)
DATA_ARGS=(
    --prompt-data data/train.parquet
    --eval-prompt-data aime24=data/aime-2024.parquet aime25=data/aime-2025.jsonl
    --label-key reward_model.ground_truth
    --rm-type dapo_math
)
EVAL_AND_LOGGING_ARGS=(
    --output-dir "$RUN"
    --save "$RUN/checkpoints"
    --save-interval 10
    --auto-resume # a job that was requeued, or the same command again, goes on
)

source examples/recipes/start.bash
