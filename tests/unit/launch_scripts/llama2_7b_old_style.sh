#!/bin/bash
# Llama-2-7B as such scripts were written years ago: flags in strings, and names that Megatron-LM has dropped since.
CHECKPOINT_PATH=${1:-checkpoints/llama2}
DATA_PATH=my-corpus_text_document

DISTRIBUTED_ARGS="--nproc_per_node 8 --nnodes 1 --master_addr localhost --master_port 6000"

GPT_ARGS="
    --tensor-model-parallel-size 2 \
    --pipeline-model-parallel-size 2 \
    --sequence-parallel \
    --num-layers 32 \
    --hidden-size 4096 \
    --ffn-hidden-size 11008 \
    --num-attention-heads 32 \
    --group-query-attention \
    --num-query-groups 32 \
    --seq-length 4096 \
    --max-position-embeddings 4096 \
    --use-rotary-position-embeddings \
    --no-position-embedding \
    --normalization RMSNorm \
    --norm-epsilon 1e-05 \
    --swiglu \
    --untie-embeddings-and-output-weights \
    --disable-bias-linear \
    --attention-dropout 0 \
    --hidden-dropout 0 \
    --no-query-key-layer-scaling \
    --attention-softmax-in-fp32 \
    --micro-batch-size 4 \
    --global-batch-size 1024 \
    --rampup-batch-size 16 16 5859375 \
    --lr 3.0e-4 \
    --train-iters 500000 \
    --lr-decay-iters 430000 \
    --lr-decay-style cosine \
    --min-lr 3.0e-5 \
    --weight-decay 1e-1 \
    --start-weight-decay 0.1 \
    --end-weight-decay 0.1 \
    --weight-decay-incr-style constant \
    --adam-beta2 .95 \
    --lr-warmup-fraction .001 \
    --lr-warmup-init 0.0 \
    --clip-grad 1.0 \
    --initial-loss-scale 65536 \
    --optimizer adam \
    --bf16 \
    --seed 42 \
    --accumulate-allreduce-grads-in-fp32 \
    --no-async-tensor-model-parallel-allreduce \
    --no-gradient-accumulation-fusion \
    --recompute-granularity full \
    --recompute-method uniform \
    --recompute-num-layers 1 \
    --distributed-backend nccl \
    --distributed-timeout-minutes 100 \
    --use-distributed-optimizer
"

DATA_ARGS="
    --data-path $DATA_PATH \
    --data-impl mmap \
    --vocab-file gpt2-vocab.json \
    --merge-file gpt2-merges.txt \
    --reset-position-ids --reset-attention-mask --eod-mask-loss \
    --split 949,50,1
"

OUTPUT_ARGS="
    --log-interval 100 \
    --timing-log-level 1 \
    --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard --log-memory-to-tensorboard \
    --tensorboard-queue-size 5 \
    --save-interval 10000 \
    --save-retain-interval 20000 \
    --exit-interval 50000 \
    --exit-signal-handler \
    --use-dist-ckpt --dist-ckpt-format torch_dist --auto-detect-ckpt-format \
    --finetune \
    --eval-interval 1000 \
    --eval-iters 10
"

torchrun $DISTRIBUTED_ARGS pretrain_gpt.py \
    $GPT_ARGS \
    $DATA_ARGS \
    $OUTPUT_ARGS \
    --save $CHECKPOINT_PATH \
    --load $CHECKPOINT_PATH
