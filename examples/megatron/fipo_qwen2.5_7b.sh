#!/bin/bash
# Trains Qwen2.5-7B with FIPO on nodes of 8 GPUs.
#
#   bash fipo_qwen2.5_7b.sh CHECKPOINT_DIR TENSORBOARD_DIR HF_MODEL_DIR PROMPTS.jsonl [more flags]

export CUDA_DEVICE_MAX_CONNECTIONS=1

CHECKPOINT_PATH=$1
TENSORBOARD_LOGS_PATH=$2
HF_CHECKPOINT=$3
PROMPT_DATA=$4
shift 4

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
TP_SIZE=${TP_SIZE:-4}
PP_SIZE=${PP_SIZE:-1}

DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NUM_NODES
    --node_rank $NODE_RANK
    --master_addr $MASTER_ADDR
    --master_port $MASTER_PORT
)

GPT_MODEL_ARGS=(
    --use-mcore-models
    --num-layers 28
    --hidden-size 3584
    --ffn-hidden-size 18944
    --num-attention-heads 28
    --group-query-attention
    --num-query-groups 4
    --seq-length 8192
    --max-position-embeddings 32768
    --position-embedding-type rope
    --rotary-base 1000000
    --no-position-embedding
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --add-qkv-bias
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --make-vocab-size-divisible-by 128
    --attention-backend auto
)

TRAINING_ARGS=(
    --micro-batch-size 1
    --global-batch-size 256
    --train-iters 50000
    --lr 1.0e-4
    --min-lr 1.0e-5
    --lr-decay-style cosine
    --lr-decay-iters 50000
    --lr-warmup-fraction 0.01
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.95
    --clip-grad 1.0
    --init-method-std 0.02
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --bf16
    --cross-entropy-loss-fusion
    --recompute-activations
    --manual-gc
)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size $TP_SIZE
    --pipeline-model-parallel-size $PP_SIZE
    --sequence-parallel
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

EVAL_AND_LOGGING_ARGS=(
    --log-interval 10
    --log-throughput
    --save-interval 1000
    --eval-interval 1000
    --eval-iters 10
    --save $CHECKPOINT_PATH
    --load $CHECKPOINT_PATH
    --ckpt-format torch_dist
    --tensorboard-dir $TENSORBOARD_LOGS_PATH
    --distributed-timeout-minutes 60
)

FIPO_ARGS=(
    --hf-checkpoint $HF_CHECKPOINT
    --prompt-data $PROMPT_DATA
    --label-key answer
    --rm-type math_verify
    --apply-chat-template
    --algorithm fipo
    --rollout-batch-size 128
    --n-samples-per-prompt 16
    --num-updates-per-rollout 8
    --rollout-max-prompt-len 1024
    --rollout-max-response-len 7168
    --overlong-buffer-len 2048
    --max-tokens-per-micro-batch 16384
    --sglang-mem-fraction-static 0.7
    --train-iters 200
    --lr 1e-6
    --lr-warmup-iters 10
    --save-interval 10
    --eval-interval 10
    --output-dir ${OUTPUT_DIR:-runs/fipo-qwen2.5-7b}
)

python -m megatron_fipo.launch ${DISTRIBUTED_ARGS[@]} -m megatron_fipo.train \
    ${GPT_MODEL_ARGS[@]} \
    ${TRAINING_ARGS[@]} \
    ${MODEL_PARALLEL_ARGS[@]} \
    ${EVAL_AND_LOGGING_ARGS[@]} \
    ${FIPO_ARGS[@]} \
    "$@"
