#!/usr/bin/env bash
# FIPO on a mixture of experts, Qwen3-30B-A3B, 4 nodes of 8 GPUs. The settings are the 32B table's but for length and batch.
#
#   bash examples/recipes/qwen3-30b-a3b-4x8.sh                             on every node, with NODE_RANK and MASTER_ADDR set
#   bash examples/recipes/qwen3-30b-a3b-4x8.sh --slurm --time 24:00:00     submits it; --dry-run shows the job
#   bash examples/recipes/qwen3-30b-a3b-4x8.sh plan                        memory by part, as below
#   bash examples/recipes/qwen3-30b-a3b-4x8.sh --print-config              every setting, and what a start would refuse
#
# Further options of the launcher may follow, and after -- further flags of the program.
#
# Why this layout. 128 experts make up 29 of the 30 billion parameters: EP 8 leaves 16 on a rank, whole (ETP 1), and the 8
# ranks that exchange tokens, TP 4 x CP 2, are one node's. TP 4 is all that 4 key-value heads allow; CP 2 halves what a rank
# keeps of the longest sequence, 18432 tokens; PP 2 halves the rest. A search without the layout's flags puts layouts without
# EP first: its cost does not know that they run 128 small matrix products where EP 8 runs 16 larger ones. Experts get more
# tokens than their share at times: the plan allows the busiest rank 1.5 times the mean. An engine's 2 GPUs cut every expert.
#
# `plan` says (nothing of this was run on a GPU):
#
#   32 GPUs of 80 GiB: TP 4 PP 2 CP 2 EP 8 DP 2, 2.01 billion parameters a rank, 9216 tokens a micro-batch,
#   transformer_engine layers
#   GiB             training  syncing  generating
#   parameters          3.74     3.74
#   gradients           7.49
#   optimizer          10.68
#   activations        22.48
#   working memory      0.47
#   engine weights              28.45       28.45
#   KV cache                                25.45
#   engine runtime                          13.25
#   weight buckets               1.25
#   reserve             6.00     6.00        6.00
#   all                50.85    39.44       73.15
#   training   |PPPGGGGGGOOOOOOOOOAAAAAAAAAAAAAAAAAAxxxxx.......................|
#   syncing    |PPPEEEEEEEEEEEEEEEEEEEEEEEBxxxxx................................|
#   generating |EEEEEEEEEEEEEEEEEEEEEEEKKKKKKKKKKKKKKKKKKKKRRRRRRRRRRRxxxxx.....|
#   P parameters, G gradients, O optimizer, A activations, W working memory, E engine weights, K KV cache, R engine
#   runtime, B weight buckets, x reserve; . free
#   pipeline ranks in training: 50.8, 39.8; shown is rank 0
#   an engine's cache holds 556025 tokens, 30 sequences of the longest; 115 GiB move to a node's main memory; a save takes
#   115 GiB of main memory; bubble 0%, communication 36% (nominal)
#   fits
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python}
MODEL=${MODEL:-models/Qwen3-30B-A3B}
RUN=${RUN:-runs/fipo-30b-a3b}
NODES=4
GPU_MEMORY_GIB=80
GPUS_PER_NODE=8

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 4
    --sequence-parallel
    --pipeline-model-parallel-size 2
    --context-parallel-size 2
    --expert-model-parallel-size 8
    --expert-tensor-parallel-size 1
)
TRAINING_ARGS=(
    --bf16
    --train-iters 500
    --moe-grouped-gemm # a rank's 16 experts in one kernel; Transformer Engine's
    --max-tokens-per-micro-batch 9216 # x CP 2 = a prompt of 2048 and a response of 16384
)
FIPO_ARGS=(
    --preset fipo-qwen2.5-32b
    --rollout-batch-size 256 # 4 updates of 64 prompts
    --num-updates-per-rollout 4
    --rollout-max-response-len 16384
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
