"""Flags of Megatron-LM that mean nothing here: refused with a reason, or accepted with a note."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

IGNORED_FLAGS: Mapping[str, str] = {
    "--micro-batch-size": "micro-batches are packed to the budget of --max-tokens-per-micro-batch",
}
"""Accepted with one note each, whatever their values: flag -> why it has no effect."""

_FAMILY = "it changes the architecture, which --hf-checkpoint supplies (Llama, Qwen2, Qwen2.5, Qwen3, Qwen3-MoE)"
_DROPLESS = "no token is dropped: its log-prob would depend on what else is in the batch"
_BALANCE = "a policy is trained on its policy loss alone"
_DEEPEP = "tokens go to their experts through --moe-token-dispatcher-type alltoall"
_EXPERT_OVERLAP = "it needs a schedule of its own, which is not supported"
_FSDP = "parameters are sharded by Megatron's distributed optimizer only, not by FSDP"
_INFERENCE = "SGLang generates, not Megatron: see --help-sglang"
_FP16 = "fp16 and its loss scaling are not supported: use --bf16"
_WEIGHTS = "weights come from --hf-checkpoint or --load"
_OFFLOAD = "offloading is not supported"
_GATHER = "weights go to the engines right after an update, so they are gathered in it"
_UNEVEN = "every pipeline stage has the same number of layers"
_GRAPHS = "CUDA graphs need fixed shapes; batches are packed to varying lengths"
_BACKEND = "the backend follows --device: nccl on CUDA, gloo on a CPU"
_SCHEDULE = "the learning rate is constant after --lr-warmup-iters updates"
_DATA = "problems come from --task or --prompt-data"
_TOKENIZER = "the tokenizer is --hf-checkpoint's"
_CHECKPOINT = "checkpoints are torch_dist, whole and written atomically: --save, --load, --save-interval"
_RL = "Megatron-LM's own RL is not used: see the algorithm and rollout groups of --help"
_LOG = "every step is logged to metrics.jsonl and TensorBoard in --output-dir"
_OTHER_MODELS = "only language models are trained here"

UNSUPPORTED_FLAGS: Mapping[str, str] = {
    # Named before the patterns: the first match is the reason given.
    "--calculate-per-token-loss": "it is always on: the loss has one global normaliser",
    "--ddp-average-in-collective": "it contradicts the global normaliser of the loss",
    "--distributed-backend": _BACKEND,
    "--pipeline-model-parallel-comm-backend": _BACKEND,
    "--use-ring-exchange-p2p": "it needs a build of torch of its own",
    "--num-distributed-optimizer-instances": "the optimizer is sharded over all data-parallel ranks",
    "--fp32-residual-connection": "it is not supported",
    "--eval-iters": "evaluation covers all of --eval-prompt-data, or --num-eval-problems of a task",
    "--finetune": "without --load a run starts from --hf-checkpoint, with it where the checkpoint stopped",
    "--use-flash-attn": "use --attention-backend flash",
    "--train-samples": "use --train-iters (steps)",
    "--batch-size": "use --global-batch-size (samples per update)",
    "--rampup-batch-size": "the batch size is fixed by --rollout-batch-size",
    "--step-batch-size-schedule": "the batch size is fixed by --rollout-batch-size",
    "--model-parallel-size": "use --tensor-model-parallel-size",
    "--persistent-save-interval": "use --save-interval",
    "--warmup": "use --lr-warmup-iters",
    "--use-mcore-models": "megatron-core's models are the only ones",
    "--local-rank": "ranks come from the launcher's environment",
    "--overlap-param-gather-with-optimizer-step": _GATHER,
    "--overlap-param-gather": _GATHER,
    "--decoder-first-pipeline-num-layers": _UNEVEN,
    "--decoder-last-pipeline-num-layers": _UNEVEN,
    "--account-for-*-in-pipeline-split": _UNEVEN,
    "--pipeline-model-parallel-layout": _UNEVEN,
    "--rl-*": _RL,
    "--no-rl-*": _RL,
    "--grpo-*": _RL,
    "--moe-layer-freq": "every layer of a Qwen3-MoE model has experts",
    "--moe-shared-expert*": _FAMILY,
    "--moe-latent-size": _FAMILY,
    "--moe-router-num-groups": _FAMILY,
    "--moe-router-group-topk": _FAMILY,
    "--moe-router-topk-scaling-factor": _FAMILY,
    "--moe-router-enable-expert-bias": _FAMILY,
    "--moe-apply-probs-on-input": _FAMILY,
    "--moe-*glu-interleave-size": _FAMILY,
    "--moe-*upcycling*": _FAMILY,
    "--moe-router-bias-update-rate": _BALANCE,
    "--moe-router-quantile-balancing-ema": _BALANCE,
    "--moe-z-loss-coeff": _BALANCE,
    "--moe-input-jitter-eps": "with noise the log-probs of the policy and of its old self differ before any update",
    "--moe-router-force-*": "experts would be chosen without the router",
    "--moe-*capacity*": _DROPLESS,
    "--moe-token-drop-policy": _DROPLESS,
    "--moe-*deepep*": _DEEPEP,
    "--moe-*hybridep*": _DEEPEP,
    "--moe-*ncclep*": _DEEPEP,
    "--moe-flex-*": _DEEPEP,
    "--moe-layer-recompute": "use --recompute-granularity selective --recompute-modules moe",
    "--moe-router-padding-*": "it is not supported",
    "--moe-enable-routing-replay": "it is not supported",
    "--moe-routing-trace-*": "it is not supported",
    "--moe-paged-stash*": "it is not supported",
    "--moe-pad-experts-*": "it is not supported",
    "--moe-per-layer-logging": _LOG,
    "--expert-tensor-parallel-num-weight-shards": "it is not supported",
    "--overlap-moe-*": _EXPERT_OVERLAP,
    "--ep-overlap-*": _EXPERT_OVERLAP,
    "--overlap-dispatch-*": _EXPERT_OVERLAP,
    "--delay-wgrad-compute": _EXPERT_OVERLAP,
    "--use-grouped-gemm-*": "it is not supported",
    "--high-priority-a2a-*": "it is not supported",
    "--mamba-*": _FAMILY,
    "--disable-mamba-*": _FAMILY,
    "--hybrid-*": _FAMILY,
    "--is-hybrid-model": _FAMILY,
    "--linear-*": _FAMILY,
    "--dsa-*": _FAMILY,
    "--no-dsa-*": _FAMILY,
    "--disable-dsa-*": _FAMILY,
    "--experimental-attention-variant": _FAMILY,
    "--multi-latent-attention": _FAMILY,
    "--mla-*": _FAMILY,
    "--mtp-*": _FAMILY,
    "--mup-*": _FAMILY,
    "--use-mup": _FAMILY,
    "--mlp-chunks-*": _FAMILY,
    "--mrope-section": _FAMILY,
    "--heterogeneous-*": _FAMILY,
    "--window-*": _FAMILY,
    "--no-rope-freq": _FAMILY,
    "--softmax-type": _FAMILY,
    "--glu-linear-offset": _FAMILY,
    "--activation-func-*": _FAMILY,
    "--attention-output-gate": _FAMILY,
    "--qk-l2-norm": _FAMILY,
    "--qk-clip*": _FAMILY,
    "--log-max-attention-logit": _FAMILY,
    "--squared-relu": _FAMILY,
    "--quick-geglu": _FAMILY,
    "--openai-gelu": _FAMILY,
    "--use-fused-weighted-squared-relu": _FAMILY,
    "--no-position-embedding": _FAMILY,
    "--yarn-*": _FAMILY,
    "--use-megatron-fsdp": _FSDP,
    "--use-torch-fsdp2": _FSDP,
    "--fsdp-*": _FSDP,
    "--megatron-fsdp-*": _FSDP,
    "--torch-fsdp2-*": _FSDP,
    "--data-parallel-sharding-strategy": _FSDP,
    "--outer-dp-sharding-strategy": _FSDP,
    "--keep-fp8-transpose-cache": _FSDP,
    "--suggested-communication-unit-size": _FSDP,
    "--enable-full-sharding-in-hsdp": _FSDP,
    "--inference-*": _INFERENCE,
    "--no-inference-*": _INFERENCE,
    "--flash-decode": _INFERENCE,
    "--nccl-all-reduce-for-prefill": _INFERENCE,
    "--symmetric-ar-type": _INFERENCE,
    "--fp16*": _FP16,
    "--*loss-scale*": _FP16,
    "--hysteresis": _FP16,
    "--no-initialization": _WEIGHTS,
    "--init-*": _WEIGHTS,
    "--embedding-init-*": _WEIGHTS,
    "--pretrained-checkpoint": _WEIGHTS,
    "--*offload*": _OFFLOAD,
    "--overlap-cpu-optimizer-d2h-h2d": _OFFLOAD,
    "--no-pin-cpu-*": _OFFLOAD,
    "--microbatch-group-size-*": "interleaved stages take micro-batches in groups of the pipeline's size",
    "--defer-embedding-wgrad-compute": "it is not supported",
    "--wgrad-deferral-limit": "it is not supported",
    "--tensor-parallel-num-weight-shards": "it is not supported",
    "--use-transformer-engine-op-fuser": "it is not supported",
    "--hierarchical-context-parallel-sizes": "use --context-parallel-size alone",
    "--max-seqlen-per-dp-cp-rank": "use --context-parallel-size alone",
    "--*cuda-graph*": _GRAPHS,
    "--te-rng-tracker": _GRAPHS,
    "--muon-*": "Adam is the only optimizer",
    "--sgd-momentum": "Adam is the only optimizer",
    "--lion-*": "Adam is the only optimizer",
    "--*kitchen*": "it is not supported",
    "--lr-*": _SCHEDULE,
    "--decoupled-*": _SCHEDULE,
    "--*-weight-decay": "the weight decay is constant",
    "--weight-decay-incr-style": "the weight decay is constant",
    "--*opt-param-scheduler": _SCHEDULE,
    "--data-*": _DATA,
    "--*-data-path": _DATA,
    "--split": _DATA,
    "--mock-data": _DATA,
    "--dataloader-*": _DATA,
    "--num-workers": _DATA,
    "--reset-*": "sequences are packed without crossing attention or positions",
    "--eod-mask-loss": "the loss covers the response tokens",
    "--tokenizer-*": _TOKENIZER,
    "--vocab-file": _TOKENIZER,
    "--merge-file": _TOKENIZER,
    "--chat-template": _TOKENIZER,
    "--*ckpt*": _CHECKPOINT,
    "--no-save-*": _CHECKPOINT,
    "--no-load-*": _CHECKPOINT,
    "--use-checkpoint-args": _CHECKPOINT,
    "--async-*": _CHECKPOINT,
    "--log-*": _LOG,
    "--tensorboard-*": _LOG,
    "--wandb-*": _LOG,
    "--timing-*": _LOG,
    "--dino-*": _OTHER_MODELS,
    "--bert-*": _OTHER_MODELS,
    "--vision-*": _OTHER_MODELS,
    "--fim-*": _OTHER_MODELS,
}
"""Refused: flag, or shell-style pattern of flags -> why. The first match counts."""


def unsupported_reason(flag: str) -> str | None:
    """Why a Megatron-LM flag is refused, or None when the table does not refuse it."""
    for pattern, reason in UNSUPPORTED_FLAGS.items():
        if fnmatchcase(flag, pattern):
            return reason
    return None
