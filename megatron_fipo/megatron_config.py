"""What the trainer tells Megatron: a frozen dataclass under Megatron-LM's names, checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_fipo.config import require, setting

RECOMPUTE_MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
"""Parts of a layer that megatron-core recomputes by name."""


@dataclass(frozen=True)
class MegatronSettings:
    """What the trainer tells Megatron, as plain values.

    The mappings hold only what was given explicitly, under megatron-core's field names, enums and dtypes by their names
    ("flash", "bf16"): `transformer` for TransformerConfig, `optimizer` for OptimizerConfig, `ddp` for
    DistributedDataParallelConfig. `model` holds what Megatron-LM keeps outside of them: the checkpoint supplies it, so
    it is only compared. A field of this class never appears in a mapping.
    """

    tensor_model_parallel_size: int = setting(1, "tensor-parallel ranks")
    pipeline_model_parallel_size: int = setting(1, "pipeline stages")
    num_layers_per_virtual_pipeline_stage: int | None = setting(
        None, "interleave the pipeline: layers in each of a rank's chunks"
    )
    num_virtual_stages_per_pipeline_rank: int | None = setting(
        None, "interleave the pipeline: chunks of layers on each rank"
    )
    context_parallel_size: int = setting(1, "context-parallel ranks")
    expert_model_parallel_size: int = setting(1, "expert-parallel ranks: each holds a share of the experts")
    expert_tensor_parallel_size: int | None = setting(
        None, "ranks that cut each expert (default: --tensor-model-parallel-size)"
    )
    sequence_parallel: bool = setting(False, "shard activations between the tensor-parallel parts along the sequence")
    bf16: bool = setting(False, "compute in bf16 on fp32 master weights (default: fp32 throughout)")
    transformer_impl: Literal["local", "transformer_engine"] | None = setting(
        None, "layers, by default transformer_engine on CUDA"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where the trainer runs; auto: CUDA when there is any")
    lr: float = setting(1e-6, "learning rate after the warm-up")
    lr_decay_style: Literal["constant"] = setting("constant", "the schedule after the warm-up")
    lr_warmup_iters: int = setting(10, "updates of linear warm-up")
    weight_decay: float = setting(0.1, "decoupled weight decay; norms and biases are not decayed")
    clip_grad: float = setting(1.0, "largest gradient norm; 0 switches clipping off")
    adam_beta1: float = setting(0.9, "Adam's decay of the mean of gradients")
    adam_beta2: float = setting(0.999, "Adam's decay of the mean of squares")
    adam_eps: float = setting(1e-8, "Adam's epsilon")
    model: Mapping[str, Any] = field(default_factory=dict)
    transformer: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    ddp: Mapping[str, Any] = field(default_factory=dict)

    def virtual_stages(self, num_layers: int) -> int:
        """Chunks of layers that each pipeline rank holds of a model of `num_layers`; 1: not interleaved.

        Raises ValueError when --num-layers-per-virtual-pipeline-stage does not divide what a rank holds.
        """
        if self.num_layers_per_virtual_pipeline_stage is None:
            return self.num_virtual_stages_per_pipeline_rank or 1
        per_rank = num_layers // self.pipeline_model_parallel_size
        require(
            num_layers % self.pipeline_model_parallel_size == 0
            and per_rank % self.num_layers_per_virtual_pipeline_stage == 0,
            "--num-layers-per-virtual-pipeline-stage",
            self.num_layers_per_virtual_pipeline_stage,
            f"a divisor of the layers on one pipeline rank ({num_layers} of the model / "
            f"{self.pipeline_model_parallel_size} ranks)",
        )
        return per_rank // self.num_layers_per_virtual_pipeline_stage

    @property
    def optimizer_fields(self) -> dict[str, Any]:
        """OptimizerConfig's fields as this run wants them: our defaults, then what was given explicitly."""
        names = ("lr", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps")
        return {name: getattr(self, name) for name in names} | dict(self.optimizer)

    def _check_virtual_stages(self) -> None:
        flags = ("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank")
        values = (self.num_layers_per_virtual_pipeline_stage, self.num_virtual_stages_per_pipeline_rank)
        require(None in values, flags[0], values[0], f"absent when {flags[1]} ({values[1]}) is given")
        for flag, value in zip(flags, values):
            require(value is None or value >= 1, flag, value, ">= 1")
            require(
                value is None or self.pipeline_model_parallel_size > 1,
                flag,
                value,
                "used with --pipeline-model-parallel-size > 1: it interleaves the stages of a pipeline",
            )

    def __post_init__(self) -> None:
        for name in ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor"):
            flag, size = f"--{name.replace('_', '-')}-parallel-size", getattr(self, f"{name}_parallel_size")
            require(size is None or size >= 1, flag, size, ">= 1")
        self._check_virtual_stages()
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "--sequence-parallel",
            True,
            f"used with --tensor-model-parallel-size ({self.tensor_model_parallel_size}) > 1",
        )
        require(0 <= self.lr < 1, "--lr", self.lr, "in [0, 1)")
        require(self.lr_warmup_iters >= 0, "--lr-warmup-iters", self.lr_warmup_iters, ">= 0 updates")
        require(0 <= self.weight_decay < 1, "--weight-decay", self.weight_decay, "in [0, 1)")
        require(self.clip_grad >= 0, "--clip-grad", self.clip_grad, ">= 0")
        require(0 <= self.adam_beta1 < 1, "--adam-beta1", self.adam_beta1, "in [0, 1)")
        require(0 <= self.adam_beta2 < 1, "--adam-beta2", self.adam_beta2, "in [0, 1)")
        require(0 < self.adam_eps < 1, "--adam-eps", self.adam_eps, "in (0, 1)")
        require(
            not (self.transformer_impl == "transformer_engine" and self.device == "cpu"),
            "--transformer-impl",
            self.transformer_impl,
            "local when --device is cpu: Transformer Engine needs CUDA",
        )
        divisor = self.model.get("make_vocab_size_divisible_by", 1)
        require(divisor >= 1, "--make-vocab-size-divisible-by", divisor, ">= 1")
        for name in ("hidden_dropout", "attention_dropout"):
            require(
                self.transformer.get(name, 0) == 0,
                "--" + name.replace("_", "-"),
                self.transformer.get(name),
                "0: with dropout the log-probs of the policy and of its old self differ before any update",
            )
        require(
            self.optimizer.get("optimizer", "adam") == "adam", "--optimizer", self.optimizer.get("optimizer"), "adam"
        )
        self._check_recompute()
        self._check_precision_aware()

    def _check_precision_aware(self) -> None:
        for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            require(
                self.optimizer.get(name, "fp32") == "fp32" or bool(self.optimizer.get("use_precision_aware_optimizer")),
                "--" + name.replace("_", "-"),
                self.optimizer.get(name),
                "fp32 without --use-precision-aware-optimizer",
            )

    def _check_recompute(self) -> None:
        granularity = self.transformer.get("recompute_granularity")
        for name in ("recompute_method", "recompute_num_layers"):
            flag, value = "--" + name.replace("_", "-"), self.transformer.get(name)
            if granularity == "full":
                require(value is not None, flag, value, "given with --recompute-granularity full")
            else:
                require(value is None, flag, value, f"unset unless --recompute-granularity ({granularity}) is full")
        of_experts = self.transformer.get("moe_layer_recompute", False)
        where = "absent with --recompute-granularity full, which recomputes experts with the rest of a layer"
        require(not (of_experts and granularity == "full"), "--moe-layer-recompute", of_experts, where)
        for module in self.transformer.get("recompute_modules") or ():
            known = ", ".join(RECOMPUTE_MODULES)
            require(module in RECOMPUTE_MODULES, "--recompute-modules", module, f"some of {known}")
