"""The policy: megatron-core's GPT model whose last pipeline stage answers with log-probs instead of logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fipo.actor.local_spec import Pack, PackedAttention, local_block_spec
from megatron_fipo.actor.logprob_head import LogprobHead, model_takes_output_processor, policy_output
from megatron_fipo.actor.megatron_flags import checked_config
from megatron_fipo.actor.moe_layers import ROUTER_FIELDS
from megatron_fipo.actor.owned_tensors import require_on_device
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.types import PackedBatch
from megatron_fipo.weights.architecture import Architecture, to_gpt_model_fields, to_transformer_fields

# What must be off where there is no CUDA kernel behind it; megatron-core's defaults assume one.
_WITHOUT_CUDA = {
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "batch_p2p_comm": False,
    "overlap_p2p_comm": False,  # gives wrong gradients on gloo
}


def transformer_config(
    arch: Architecture,
    layout: ParallelLayout,
    *,
    params_dtype: torch.dtype,
    device: torch.device,
    overrides: Mapping[str, Any],
) -> TransformerConfig:
    """megatron-core's configuration for a checkpoint's architecture in a layout; `overrides` are the user's flags.

    Raises ValueError for flags that megatron-core does not take together.
    """
    fields: dict[str, Any] = {
        **to_transformer_fields(arch),
        **(ROUTER_FIELDS if arch.num_moe_experts else {}),
        "activation_func": F.silu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": params_dtype,
        "pipeline_dtype": params_dtype,
        "bf16": params_dtype == torch.bfloat16,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.sequence_parallel,
        "variable_seq_lengths": True,  # every micro-batch is packed to its own length
        "moe_token_dispatcher_type": "alltoall",  # asked for by variable_seq_lengths, for dense models too
        "calculate_per_token_loss": True,  # one division, by the global count, after the last micro-batch
        "deallocate_pipeline_outputs": True,
        "gradient_accumulation_fusion": True,  # Megatron-LM's default: weight gradients are added in the GEMM
        # weights come from the checkpoint; initialisation still has to run, it marks what is tensor parallel
        "init_method": _leave_uninitialised,
        "output_layer_init_method": _leave_uninitialised,
        "embedding_init_method": _leave_uninitialised,
    }
    if layout.vpp > 1:
        fields.update(overlap_p2p_comm=True, batch_p2p_comm=False)  # Megatron-LM's default
    if device.type == "cpu":
        fields.update(_WITHOUT_CUDA)
    return checked_config(TransformerConfig, {**fields, **overrides})


def _leave_uninitialised(weight: Tensor) -> Tensor:
    return weight


class PolicyModel(GPTModel):
    """GPTModel with log-probs and entropy as its output: what `policy_output` says, on the last stage."""

    def __init__(self, *, true_vocab_size: int, temperature: float, logprobs_chunk_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = LogprobHead(
            tp_group=self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
            vocab_size=true_vocab_size,
            temperature=temperature,
            chunk_size=logprobs_chunk_size,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """GPTModel's, through its hook for the output where it has one."""
        if model_takes_output_processor():
            kwargs.update(output_processor=policy_output, output_processor_context=self.head)
        return super().forward(*args, **kwargs)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """megatron-core's, with Transformer Engine's extra states empty: they are pickles, which no checkpoint of ours
        holds, and what is in them is kept as tensors (fp8_scaling.py)."""
        state = super().sharded_state_dict(*args, **kwargs)
        for entry in state.values():
            if isinstance(entry, ShardedObject) and "_extra_state" in entry.key and isinstance(entry.data, Tensor):
                entry.data = entry.data.new_empty(0)
        return state

    def _preprocess(self, **kwargs: Any) -> tuple[Any, ...]:
        packed = kwargs["packed_seq_params"]
        if packed.qkv_format == "thd":
            return super()._preprocess(**kwargs)
        # as "thd" Megatron gives the whole table; else it cuts it for this context-parallel rank
        kwargs["packed_seq_params"] = replace(packed, qkv_format="thd")
        decoder_input, table, *rest = super()._preprocess(**kwargs)
        return decoder_input, table.index_select(0, kwargs["position_ids"][0]), *rest

    def _postprocess(self, **kwargs: Any) -> Tensor:
        if model_takes_output_processor() or not self.post_process:
            return super()._postprocess(**kwargs)
        tied = self.share_embeddings_and_output_weights
        return policy_output(
            **kwargs,
            output_layer=self.output_layer,
            output_weight=self.shared_embedding_or_output_weight() if tied else None,
            context=self.head,
        )


def build_policy(
    arch: Architecture,
    config: TransformerConfig,
    layout: ParallelLayout,
    *,
    padded_vocab: int,
    transformer_impl: str,
    ddp: Mapping[str, Any],
    temperature: float,
    logprobs_chunk_size: int,
    device: torch.device,
) -> list[DistributedDataParallel]:
    """This rank's chunks of the model (one, unless stages are interleaved), without weights yet, in Megatron's DDP."""
    ddp_config = checked_config(
        DistributedDataParallelConfig,
        {"use_distributed_optimizer": True, "grad_reduce_in_fp32": True, "overlap_grad_reduce": False, **ddp},
    )
    chunks = []
    for index in range(layout.vpp):
        chunk_index = index if layout.vpp > 1 else None
        model = PolicyModel(
            true_vocab_size=arch.vocab_size,
            temperature=temperature,
            logprobs_chunk_size=logprobs_chunk_size,
            config=config,
            transformer_layer_spec=_block_spec(
                config, arch.num_layers // (layout.pp * layout.vpp), transformer_impl, chunk_index
            ),
            vocab_size=padded_vocab,
            pre_process=layout.is_first_stage and index == 0,
            post_process=layout.is_last_stage and index == layout.vpp - 1,
            parallel_output=True,
            vp_stage=chunk_index,
            **to_gpt_model_fields(arch),
        )
        module: nn.Module = model.to(device)
        if config.bf16:
            module = Float16Module(config, module)
        # as in Megatron-LM: communication of the later chunks hides behind computation by itself
        chunks.append(DistributedDataParallel(config, ddp_config, module, disable_bucketing=index > 0))
    return chunks


def gather_parameters(chunks: Sequence[DistributedDataParallel]) -> None:
    """Before anything but a forward pass reads parameters: with `overlap_param_gather` an optimizer step leaves every
    rank its own shard new and the others' old, until the next forward pass or this. Collective over all ranks.

    Raises ActorAway when the parameters are not on the device.
    """
    require_on_device(chunks)
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def unwrapped(model: nn.Module) -> PolicyModel:
    """The PolicyModel inside Megatron's wrappers."""
    while not isinstance(model, PolicyModel):
        model = model.module
    return model


def run_model(model: nn.Module, batch: PackedBatch) -> Tensor:
    """One packed micro-batch through this stage: hidden states [S, 1, h] or, on the last stage, `[2, T]`."""
    longest = int(batch.cu_seqlens.diff().max())
    is_local = isinstance(next(iter(unwrapped(model).decoder.layers)).self_attention.core_attention, PackedAttention)
    packed = Pack(
        # "thd" restarts positions at every sequence; where prompts are shared, each row has a position of its own
        qkv_format="sbhd" if is_local else "thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        cu_seqlens_q_padded=batch.cu_seqlens,
        cu_seqlens_kv_padded=batch.cu_seqlens,
        rows=batch.rows,
        positions_of_rows=batch.positions_of_rows,
    )
    return model(
        batch.token_ids[None],
        batch.position_ids[None],
        None,
        labels=batch.labels[None],
        loss_mask=batch.loss_mask[None],
        packed_seq_params=packed,
    )


def _block_spec(config: TransformerConfig, num_layers: int, transformer_impl: str, chunk_index: int | None) -> Any:
    if transformer_impl == "local":
        return local_block_spec(config, num_layers)
    if transformer_impl == "transformer_engine":
        try:
            import transformer_engine.pytorch  # noqa: F401  # megatron-core would take a broken one for an absent one
        except (ImportError, OSError, RuntimeError) as error:
            raise ValueError(
                "--transformer-impl is 'transformer_engine', but Transformer Engine cannot be loaded: "
                f"{' '.join(str(error).split())}. Build it against this torch: "
                "pip install --no-build-isolation -r requirements/gpu.txt"
            ) from error
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=chunk_index)
    raise ValueError(f"--transformer-impl is {transformer_impl!r}, but must be local or transformer_engine")
