#!/bin/bash
# Qwen3-30B-A3B, experts spread over the eight GPUs of a node, four nodes.
MASTER_ADDR=${MASTER_ADDR:-"localhost"}
NNODES=${SLURM_NNODES:-"4"}
NODE_RANK=${SLURM_NODEID:-"0"}

DISTRIBUTED_ARGS=(
    --nproc_per_node 8
    --nnodes $NNODES
    --node_rank $NODE_RANK
    --master_addr $MASTER_ADDR
    --master_port 6000
)

MODEL_ARGS=(
    --use-mcore-models
    --disable-bias-linear
    --seq-length 4096
    --max-position-embeddings 40960
    --num-layers 48
    --hidden-size 2048
    --ffn-hidden-size 6144
    --num-attention-heads 32
    --kv-channels 128
    --qk-layernorm
    --init-method-std 0.02
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --position-embedding-type rope
    --rotary-base 1000000
    --rotary-percent 1.0
    --rotary-seq-len-interpolation-factor 1
    --swiglu
    --untie-embeddings-and-output-weights
    --group-query-attention
    --num-query-groups 4
    --make-vocab-size-divisible-by 1187
    --no-masked-softmax-fusion
    --no-position-embedding
    --no-rope-fusion
    --no-bias-swiglu-fusion
)

MOE_ARGS=(
    --num-experts 128
    --moe-ffn-hidden-size 768
    --moe-layer-freq '([1]*48)'
    --moe-router-topk 8
    --moe-router-dtype fp32
    --moe-router-score-function softmax
    --moe-router-load-balancing-type aux_loss # options: aux_loss, sinkhorn, none
    --moe-aux-loss-coeff 1e-3
    --moe-z-loss-coeff 1e-3
    --moe-grouped-gemm
    --moe-permute-fusion
    --moe-layer-recompute
    --moe-token-dispatcher-type flex
    --moe-enable-deepep
    --overlap-param-gather
    --overlap-grad-reduce
)

DATA_ARGS=(
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model ${TOKENIZER_MODEL:-tokenizer}
    --data-path 0.3 first_text_document 0.7 second_text_document
    --data-cache-path cache
    --dataloader-type cyclic
    --split 99990,8,2
)

TRAINING_ARGS=(
    --micro-batch-size 1
    --global-batch-size 256
    --lr 3e-4
    --train-iters 500000
    --lr-decay-iters 320000
    --lr-decay-style WSD
    --lr-wsd-decay-style exponential
    --lr-wsd-decay-iters 1000
    --min-lr 1.0e-5
    --weight-decay 0.1
    --lr-warmup-iters 2000
    --clip-grad 1.0
    --bf16
    --use-flash-attn
    --no-check-for-nan-in-loss-and-grad
)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 4
    --num-layers-per-virtual-pipeline-stage 6
    --expert-model-parallel-size 8
    --expert-tensor-parallel-size 1
    --use-distributed-optimizer
    --sequence-parallel
)

LOGGING_ARGS=(
    --log-interval 1 \
    --save-interval 10000 \
    --eval-interval 1000 \
    --eval-iters 10 \
    --save ${CHECKPOINT_PATH:-checkpoints/moe} \
    --load ${CHECKPOINT_PATH:-checkpoints/moe} \
    --tensorboard-dir "${CHECKPOINT_PATH:-checkpoints/moe}/tensorboard" \
    --no-load-optim \
    --no-load-rng
)

if [ -n "${WANDB_API_KEY:-}" ]; then
    LOGGING_ARGS+=(--wandb-project ${WANDB_PROJECT:-"moe"} --wandb-exp-name ${WANDB_NAME:-"qwen3"})
fi

torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py \
    ${MODEL_ARGS[@]} \
    ${MOE_ARGS[@]} \
    ${DATA_ARGS[@]} \
    ${TRAINING_ARGS[@]} \
    ${MODEL_PARALLEL_ARGS[@]} \
    ${LOGGING_ARGS[@]}
