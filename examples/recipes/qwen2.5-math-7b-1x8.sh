#!/usr/bin/env bash
# The paper's 7B-MATH settings on one node of 8 GPUs. docs/reproduce.md has models and data.
#
#   bash examples/recipes/qwen2.5-math-7b-1x8.sh                             on that node
#   bash examples/recipes/qwen2.5-math-7b-1x8.sh --slurm --time 24:00:00     submits it; --dry-run shows the job
#   bash examples/recipes/qwen2.5-math-7b-1x8.sh plan                        memory by part, as below
#   bash examples/recipes/qwen2.5-math-7b-1x8.sh --print-config              every setting, and what a start would refuse
#
# Further options of the launcher may follow, and after -- further flags of the program.
#
# Why this layout. TP 2 communicates half as much as TP 4, and CP 2 brings the longest sequence, 12288 tokens, down to 6144 a
# rank, so that nothing is recomputed; DP is 2, and the optimizer is sharded over DP x CP = 4. TP 2 alone would fill the GPU
# to the brim, TP 4 alone is nominally 7 % slower. An engine for each GPU: 60 of the longest responses at once each. A
# generation batch of 2048 x 32 responses takes a quarter of the GPUs four times as long as on four nodes: hence the timeout.
#
# `plan` says (nothing of this was run on a GPU):
#
#   8 GPUs of 80 GiB: TP 2 CP 2 DP 2, 3.81 billion parameters a rank, 6144 tokens a micro-batch, transformer_engine layers
#   GiB             training  syncing  generating
#   parameters          7.09     7.09
#   gradients          14.19
#   optimizer          10.64
#   activations        19.68
#   logits              0.15
#   working memory      1.60
#   engine weights              14.19       14.19
#   KV cache                                39.71
#   engine runtime                          13.12
#   weight buckets               1.25
#   reserve             6.00     6.00        6.00
#   all                59.34    28.53       73.02
#   training   |PPPPPPGGGGGGGGGGGOOOOOOOOOAAAAAAAAAAAAAAAWWxxxx.................|
#   syncing    |PPPPPPEEEEEEEEEEEBxxxxx.........................................|
#   generating |EEEEEEEEEEEKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKRRRRRRRRRRRxxxx......|
#   P parameters, G gradients, O optimizer, A activations, L logits, W working memory, E engine weights, K KV cache, R
#   engine runtime, B weight buckets, x reserve; . free
#   an engine's cache holds 743642 tokens, 60 sequences of the longest; 142 GiB move to a node's main memory; a save takes
#   99 GiB of main memory; bubble 0%, communication 4% (nominal)
#   fits
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python}
MODEL=${MODEL:-models/Qwen2.5-Math-7B-32k}
RUN=${RUN:-runs/fipo-7b-1x8}
NODES=1
GPU_MEMORY_GIB=80
GPUS_PER_NODE=8

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 2
    --sequence-parallel
    --context-parallel-size 2
)
TRAINING_ARGS=(
    --bf16
    --train-iters 500
    --max-tokens-per-micro-batch 6144 # x CP 2 = a prompt of 2048 and a response of 10240
)
FIPO_ARGS=(
    --preset fipo-qwen2.5-math-7b # the paper's table; a flag here wins over it
)
ROLLOUT_ARGS=(
    --rollout-num-gpus-per-engine 1
    --rollout-request-timeout-s 28800
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
