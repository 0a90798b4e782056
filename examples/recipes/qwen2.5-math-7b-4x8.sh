#!/usr/bin/env bash
# The paper's 7B-MATH run: FIPO on Qwen2.5-Math-7B, 4 nodes of 8 GPUs. docs/reproduce.md has models and data.
#
#   bash examples/recipes/qwen2.5-math-7b-4x8.sh                             on every node, with NODE_RANK and MASTER_ADDR set
#   bash examples/recipes/qwen2.5-math-7b-4x8.sh --slurm --time 24:00:00     submits it; --dry-run shows the job
#   bash examples/recipes/qwen2.5-math-7b-4x8.sh plan                        memory by part, as below
#   bash examples/recipes/qwen2.5-math-7b-4x8.sh --print-config              every setting, and what a start would refuse
#
# Further options of the launcher may follow, and after -- further flags of the program.
#
# Why this layout. TP 4 is all that 4 key-value heads allow and stays inside a node; the longest sequence, 12288 tokens, then
# needs neither CP nor recomputation, and half of the GPU is to spare for longer ones. The model is small enough for PP 1: no
# bubble. What is left, 8, is DP, over which the optimizer is sharded. 2 GPUs an engine halve its weights, for a larger cache.
#
# `plan` says (nothing of this was run on a GPU):
#
#   32 GPUs of 80 GiB: TP 4 DP 8, 1.90 billion parameters a rank, 12288 tokens a micro-batch, transformer_engine layers
#   GiB             training  syncing  generating
#   parameters          3.55     3.55
#   gradients           7.09
#   optimizer           2.66
#   activations        19.88
#   logits              0.07
#   working memory      0.93
#   engine weights               7.09        7.09
#   KV cache                                46.81
#   engine runtime                          13.25
#   weight buckets               1.25
#   reserve             6.00     6.00        6.00
#   all                40.18    17.89       73.15
#   training   |PPPGGGGGGOOAAAAAAAAAAAAAAAAxxxxx................................|
#   syncing    |PPPEEEEEEBxxxx..................................................|
#   generating |EEEEEEKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKRRRRRRRRRRRxxxxx.....|
#   P parameters, G gradients, O optimizer, A activations, L logits, W working memory, E engine weights, K KV cache, R
#   engine runtime, B weight buckets, x reserve; . free
#   an engine's cache holds 1752890 tokens, 142 sequences of the longest; 50 GiB move to a node's main memory; a save
#   takes 35 GiB of main memory; bubble 0%, communication 10% (nominal)
#   fits
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python}
MODEL=${MODEL:-models/Qwen2.5-Math-7B-32k}
RUN=${RUN:-runs/fipo-7b}
NODES=4
GPU_MEMORY_GIB=80
GPUS_PER_NODE=8

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 4
    --sequence-parallel
)
TRAINING_ARGS=(
    --bf16
    --train-iters 500
    --max-tokens-per-micro-batch 12288 # a prompt of 2048 and a response of 10240
)
FIPO_ARGS=(
    --preset fipo-qwen2.5-math-7b # the paper's table; a flag here wins over it
)
ROLLOUT_ARGS=(
    --rollout-num-gpus-per-engine 2
    --rollout-request-timeout-s 14400
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
