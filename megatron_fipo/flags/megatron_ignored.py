"""Flags of Megatron-LM that say nothing about an RL run, or only how fast it is: accepted, with one note each.

The rule: what would silently train something else is an error (megatron_unsupported.py); a detail of pretraining, of
its data, logs or speed, is a note.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_REASONS: Mapping[str, str] = {
    "micro-batches are packed to the budget of --max-tokens-per-micro-batch": "micro-batch-size",
    "problems come from --task or --prompt-data": """
        block-data-path data-args-path data-cache-path data-path data-per-class-fraction
        dataloader-defer-npy-index-mmap dataloader-fast-cache-load dataloader-inter-document-masking dataloader-type
        full-validation mid-level-dataset-surplus mock-data multiple-validation-sets
        no-create-attention-mask-in-dataloader no-data-sharding no-mmap-bin-files num-dataset-builder-threads
        num-workers object-storage-cache-path per-dataset-sequences-path per-split-data-args-path split test-data-path
        train-data-path valid-data-path validation-set-names
        data-impl mmap-warmup s3-cache-path""",
    "sequences are packed without crossing attention or positions": "reset-attention-mask reset-position-ids",
    "the loss covers the response tokens": "eod-mask-loss",
    "the tokenizer is --hf-checkpoint's": """
        allow-ambiguous-pad-tokens disable-tokenizer-sentencepiece-ignore-extra-whitespaces
        disable-use-tokenizer-model-from-checkpoint-args merge-file
        no-tokenizer-sentencepiece-ignore-extra-whitespaces no-use-tokenizer-model-from-checkpoint-args
        null-tokenizer-eod-id null-tokenizer-pad-id tiktoken-num-special-tokens tiktoken-pattern
        tokenizer-hf-no-include-special-tokens tokenizer-hf-no-use-fast tokenizer-metadata tokenizer-model
        tokenizer-sentencepiece-legacy tokenizer-special-tokens tokenizer-type vocab-file
        legacy-tokenizer""",
    "no code from a checkpoint's directory is run": "trust-remote-code",
    "the vocabulary is the checkpoint's, padded to --make-vocab-size-divisible-by": """
        disable-pad-vocab-size no-pad-vocab-size padded-vocab-size""",
    "positions are rotary, as the checkpoint says": "no-position-embedding",
    "weights come from --hf-checkpoint, or on resume from --load": """
        data-parallel-random-init embedding-init-method-std init-method-std init-method-xavier-uniform
        init-model-with-meta-device no-initialization""",
    "--load goes on with optimizer, random states and step; --pretrained-checkpoint takes weights alone": """
        finetune no-load-optim no-load-rng""",
    "parameters stay in bf16 beside the FP8 copies that are multiplied": """
        fp8-param-gather reuse-grad-buf-for-mxfp8-param-ag""",
    "architecture and layout come from --hf-checkpoint and the flags": """
        use-checkpoint-args use-mp-args-from-checkpoint-args""",
    "a run's length is --train-iters, in steps": "exit-interval train-samples",
    "the batch size is fixed: --rollout-batch-size x --n-samples-per-prompt / --num-updates-per-rollout": """
        decrease-batch-size-if-needed rampup-batch-size step-batch-size-schedule""",
    "the learning rate is --lr for all parameters, constant after --lr-warmup-iters updates": """
        decoupled-lr decoupled-min-lr lr-decay-iters lr-decay-samples lr-warmup-fraction lr-warmup-init
        lr-warmup-samples lr-wsd-decay-iters lr-wsd-decay-samples lr-wsd-decay-style min-lr
        override-opt-param-scheduler override-opt_param-scheduler use-checkpoint-opt-param-scheduler
        use-checkpoint-opt_param-scheduler""",
    "the weight decay is --weight-decay throughout": "end-weight-decay start-weight-decay weight-decay-incr-style",
    "only fp16 scales its loss": "hysteresis initial-loss-scale loss-scale loss-scale-window min-loss-scale",
    "a policy is trained on its policy loss alone": """
        moe-aux-loss-coeff moe-router-bias-update-rate moe-router-quantile-balancing-ema moe-z-loss-coeff""",
    "it is always on: the loss has one global normaliser": "calculate-per-token-loss",
    "no token is dropped": "moe-token-drop-policy",
    "gradients are divided once, by the global number of tokens": "ddp-average-in-collective",
    "log-probs are computed --log-probs-chunk-size tokens at a time": """
        cross-entropy-fusion-impl cross-entropy-loss-fusion""",
    "megatron-core's models are the only ones": "use-mcore-models",
    "--attention-backend chooses the kernel": "use-flash-attn",
    "evaluation covers all of --eval-prompt-data, or --num-eval-problems of a task": """
        eval-global-batch-size eval-iters eval-micro-batch-size start-eval-at-iter""",
    "every step is logged to metrics.jsonl and TensorBoard in --output-dir": """
        app-tag-run-name app-tag-run-version disable-log-loss-scale-to-tensorboard disable-straggler-on-startup
        log-device-memory-used log-energy log-interval log-memory-interval
        log-memory-to-tensorboard log-progress log-straggler log-throughput
        log-timers-to-tensorboard log-validation-ppl-to-tensorboard log-world-size-to-tensorboard logging-level
        moe-per-layer-logging no-log-loss-scale-to-tensorboard no-one-logger one-logger-async one-logger-project
        one-logger-run-name straggler-ctrlr-port straggler-minmax-count tensorboard-log-interval
        tensorboard-queue-size timing-log-level timing-log-option
        enable-one-logger log-batch-size-to-tensorboard log-learning-rate-to-tensorboard
        no-log-learnig-rate-to-tensorboard""",
    "what is logged is in docs/metrics.md": """
        log-max-attention-logit log-num-zeros-in-grad log-params-norm wandb-entity wandb-save-dir""",
    "it is not supported; docs/performance.md says how a step is timed": """
        memory-snapshot-path nvtx-ranges profile profile-ranks profile-step-end profile-step-start
        pytorch-profiler-collect-callstack pytorch-profiler-collect-chakra pytorch-profiler-collect-shapes
        record-memory-history record-shapes use-pytorch-profiler""",
    "checkpoints are torch_dist, whole and written atomically: --save, --load, --save-interval": """
        async-ckpt-cpu-priority async-ckpt-io-priority async-ckpt-use-cpu-shm async-strategy auto-detect-ckpt-format
        ckpt-assume-constant-structure ckpt-format ckpt-fully-parallel-load ckpt-fully-parallel-load-exchange-algo
        ckpt-fully-parallel-load-process-group ckpt-fully-parallel-save ckpt-fully-parallel-save-process-group
        disable-ckpt-load-validate-sharding-integrity disable-msc disable-stream-ckpt-dequant dist-ckpt-format
        dist-ckpt-optim-fully-reshardable dist-ckpt-save-pre-mcore-014 dist-ckpt-strictness dist-ckpt-workers
        distrib-optim-fully-reshardable-mem-efficient enable-msc no-ckpt-fully-parallel-save
        no-ckpt-load-validate-sharding-integrity no-save-optim no-save-rng
        no-stream-ckpt-dequant non-persistent-ckpt-type non-persistent-global-ckpt-dir non-persistent-local-ckpt-algo
        non-persistent-local-ckpt-dir non-persistent-save-interval replication replication-factor replication-jump
        use-dist-ckpt use-persistent-ckpt-worker verify-integrity""",
    "no checkpoint is removed unless --keep-last-checkpoints says so": "save-retain-interval",
    "a run saves and ends on SIGTERM, SIGUSR1 and SIGINT; have one sent before the job's time is over": """
        exit-duration-in-mins exit-signal exit-signal-handler exit-signal-handler-for-dataloader
        exit-signal-handler-for-training""",
    "a rank that dies ends the run, --auto-resume goes on": """
        calc-ft-timeouts enable-ft-package ft-num-warmup-iters inprocess-active-world-size inprocess-barrier-timeout
        inprocess-completion-timeout inprocess-empty-cuda-cache inprocess-granularity inprocess-hard-timeout
        inprocess-heartbeat-interval inprocess-heartbeat-timeout inprocess-last-call-wait inprocess-max-iterations
        inprocess-monitor-process-interval inprocess-monitor-thread-interval inprocess-progress-watchdog-interval
        inprocess-restart inprocess-soft-timeout inprocess-termination-grace-time""",
    "what is watched is in the guards group of --help": """
        check-for-spiky-loss check-weight-hash-across-dp-replicas-interval gpu-sniff-test-interval rerun-mode
        result-rejected-tracker-filename check-for-nan-in-loss-and-grad""",
    "the backend follows --device: nccl on CUDA, gloo on a CPU": """
        distributed-backend pipeline-model-parallel-comm-backend""",
    "ranks come from the launcher's environment": "local-rank",
    "use --distributed-timeout-minutes": "distributed-timeout-seconds-after-init",
    "weights go to the engines right after an update, so they are gathered in it": """
        overlap-param-gather overlap-param-gather-with-optimizer-step
        delay-param-gather no-delay-param-gather""",
    "the optimizer is sharded over all data-parallel ranks": """
        data-parallel-sharding-strategy num-distributed-optimizer-instances""",
    "tokens go to their experts through --moe-token-dispatcher-type alltoall, which computes the same": """
        moe-deepep-num-sms moe-enable-deepep moe-flex-dispatcher-backend moe-flex-dispatcher-num-sms
        moe-hybridep-num-blocks-permute moe-hybridep-num-blocks-unpermute moe-hybridep-num-sms
        moe-hybridep-num-sms-preprocessing moe-hybridep-pad-uneven-dispatch-inputs moe-ncclep-static-shape
        moe-ncclep-zero-copy moe-permute-fusion-into-hybridep""",
    "it is only about speed, and not supported": """
        create-all-gather-group ddp-num-buckets defer-embedding-wgrad-compute delay-wgrad-compute
        disable-align-grad-reduce disable-gloo-process-groups disable-jit-fuser disable-manual-gc-eval
        empty-unused-memory-level ep-overlap-early-attn-memory-release high-priority-a2a-comm-stream
        high-priority-stream-groups manual-gc manual-gc-interval microbatch-group-size-per-virtual-pipeline-stage
        moe-shared-expert-overlap nccl-communicator-config-path no-align-grad-reduce no-manual-gc-eval
        no-use-layer-wise-param-layout overlap-dispatch-backward-with-experts-wgrad overlap-moe-expert-parallel-comm
        sharp-enabled-group tp-comm-overlap-cfg train-sync-interval use-grouped-gemm-for-dense-mlp
        use-grouped-gemm-for-shared-expert use-ring-exchange-p2p use-sharp use-tp-pp-dp-mapping
        wgrad-deferral-limit
        DDP-impl async-tensor-model-parallel-allreduce delay-grad-reduce moe-use-legacy-grouped-gemm
        no-async-tensor-model-parallel-allreduce no-contiguous-buffers-in-local-ddp no-delay-grad-reduce
        no-scatter-gather-tensors-in-pipeline tp-comm-overlap-disable-fc1 tp-comm-overlap-disable-qkv
        use-contiguous-buffers-in-local-ddp""",
    "CUDA graphs need fixed shapes; batches are packed to varying lengths": """
        cuda-graph-impl cuda-graph-modules cuda-graph-scope cuda-graph-warmup-steps enable-cuda-graph
        external-cuda-graph optimizer-cuda-graph te-rng-tracker""",
    "experimental features have flags of their own": "enable-experimental",
    "what it switches off is off": "no-query-key-layer-scaling",
    "how ranks record their last collectives is torch's own default": """
        disable-flight-recorder-dump-on-timeout disable-flight-recorder-extra-dump-on-exec
        disable-flight-recorder-include-only-active flight-recorder-dump-path flight-recorder-include-stack-trace
        flight-recorder-trace-buffer-size no-flight-recorder-dump-on-timeout
        no-flight-recorder-extra-dump-on-exec no-flight-recorder-include-only-active""",
    "it is not a model's every-so-many-th layer: all have experts": "moe-layer-freq",
    "rotary positions are as the checkpoint scales them": "rope-type rotary-seq-len-interpolation-factor",
}
"""Why -> names. What stands last in a list, on a line of its own, are names of earlier versions of Megatron-LM."""

IGNORED_FLAGS: Mapping[str, str] = {f"--{name}": reason for reason, names in _REASONS.items() for name in names.split()}
"""Accepted without effect: flag -> what takes its place."""


@dataclass(frozen=True)
class Values:
    """What a flag that says nothing here may say: `allowed` matches each value whole; `because` is for any other."""

    allowed: str
    because: str


ONLY_VALUES: Mapping[str, Values] = {
    "--ckpt-format": Values("torch_dist", "torch_dist: the format of this run's checkpoints"),
    "--data-parallel-sharding-strategy": Values("no_shard|optim", "no_shard or optim: there is no FSDP"),
    "--dist-ckpt-format": Values("torch_dist", "torch_dist: the format of this run's checkpoints"),
    "--moe-layer-freq": Values(
        r"1|\(?\[1(,1)*\](\*\d+)?\)?(\*\d+)?", "1: all layers of a Qwen3-MoE model have experts"
    ),
    "--rope-type": Values("rope", "rope, the rotary positions of the supported families"),
    "--rotary-seq-len-interpolation-factor": Values(
        r"1(\.0*)?|None", "1: --hf-checkpoint says how positions are scaled"
    ),
}
"""Ignored flags of which only these values are harmless."""

_PRETRAINING_SCHEDULE = "the learning rate is constant after --lr-warmup-iters updates"
IGNORED_VALUES: Mapping[str, Values] = {
    "--lr-decay-style": Values("linear|cosine|inverse-square-root|WSD", _PRETRAINING_SCHEDULE),
    "--moe-router-load-balancing-type": Values(
        "aux_loss|seq_aux_loss|global_aux_loss",
        "no loss balances the experts: a policy is trained on its policy loss alone",
    ),
    "--moe-token-dispatcher-type": Values("allgather|flex", "alltoall is used, which computes the same"),
}
"""Values without effect of flags that are accepted with another value; here `because` is the note."""

SILENT: Mapping[str, str] = {
    "--calculate-per-token-loss": "",
    "--ckpt-format": "torch_dist",
    "--moe-aux-loss-coeff": r"0(\.0*)?",
    "--moe-layer-freq": ".*",
    "--moe-z-loss-coeff": r"0(\.0*)?",
    "--no-position-embedding": "",
    "--num-distributed-optimizer-instances": "1",
    "--rope-type": "rope",
    "--rotary-seq-len-interpolation-factor": ".*",
    "--use-mcore-models": "",
}
"""What is so anyway needs no note: flag -> its values."""


AS_IT_IS: Mapping[str, str] = {
    "--moe-router-group-topk": "1",
    "--moe-router-num-groups": "1",
    "--moe-router-topk-scaling-factor": r"1(\.0*)?",
    "--moe-shared-expert-intermediate-size": "0",
}
"""Values with which flags that are otherwise refused change nothing."""

_SHOWN = 40


def ignored_note(flag: str, values: Sequence[str], *, is_option: bool) -> str | None:
    """The note about a flag without effect, "" where it asks for what is so anyway; None where the flag has an effect.

    `is_option`: whether some values of the flag have one. Raises ValueError for a value that would have to have one.
    """
    text = " ".join(values)
    if is_option:
        rule = IGNORED_VALUES.get(flag)
        if rule is None or not values or not all(re.fullmatch(rule.allowed, value) for value in values):
            return None
        return f"{flag} {text} has no effect: {rule.because}"
    if flag in AS_IT_IS and re.fullmatch(AS_IT_IS[flag], text):
        return ""
    if flag not in IGNORED_FLAGS:
        return None
    only = ONLY_VALUES.get(flag)
    if only is not None and re.fullmatch(only.allowed, "".join(values)) is None:
        raise ValueError(f"{flag} is {text!r}, but must be {only.because}")
    if flag in SILENT and re.fullmatch(SILENT[flag], text):
        return ""
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."  # a blend of data is hundreds of words
    return f"{f'{flag} {shown}'.strip()} has no effect: {IGNORED_FLAGS[flag]}"
