"""What the tests of planning measure on every rank: bytes of states, of what forward saves, and an update's peak."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from actor_on_ranks import OPTIMIZER, make_groups, settings_for
from megatron.core import parallel_state
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.profiler import ProfilerActivity, profile

from megatron_fipo.actor.actor import Actor, build_actor
from megatron_fipo.actor.model import run_model
from megatron_fipo.actor.offload import PARTS, Offloader
from megatron_fipo.trainer.exchange import scatter_shares
from megatron_fipo.types import PackedBatch, TrainSequence
from megatron_fipo.weights.architecture import read_architecture
from megatron_fipo.weights.hf_files import HFWeights

NUM_PROMPT = 16


def run_cases(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`measure` for every case, one layout after the other."""
    found = {}
    for name, case in cases.items():
        print("case", name, flush=True)
        found[name] = measure(**case)
        parallel_state.destroy_model_parallel()
    return found


def measure(
    model_dir: str,
    layout: dict[str, Any],
    options: dict[str, Any],
    lengths: list[int],
    micro_batches: int,
    chunk_size: int,
) -> dict[str, Any]:
    """Two updates of `micro_batches` full micro-batches of sequences of `lengths`, on every data-parallel rank."""
    made, groups = make_groups(**layout)
    actor = build_actor(
        read_architecture(model_dir),
        HFWeights(model_dir),
        made,
        groups,
        params_dtype=torch.bfloat16 if options.get("bf16") else torch.float32,
        device=torch.device("cpu"),
        transformer_impl="local",
        transformer=options.get("transformer", {}),
        ddp=options.get("ddp", {}),
        optimizer=OPTIMIZER,
        lr_warmup_iters=0,
        max_tokens_per_micro_batch=sum(lengths) // made.cp,
        max_response_len=max(lengths),
        logprobs_chunk_size=chunk_size,
    )
    sequences = make_sequences(lengths * micro_batches * made.dp, actor.arch.vocab_size)
    mine = scatter_shares(sequences if made.rank == 0 else None, 1, made, groups.control, actor.arch.hidden_size)[0]
    old, _ = actor.old_logprobs([mine])

    def update() -> None:
        actor.update(mine, old, algorithm="fipo", settings=settings_for("fipo", "paper"))

    update()
    packs = actor._packed(mine, old if made.is_last_stage else None)
    to_experts = rows_to_experts(actor, packs[0]) if made.pp == 1 else []
    found: dict[str, Any] = {
        "states": state_bytes(actor),
        "rows": [len(pack.token_ids) for pack in packs],
        "rows_to_experts": to_experts,
        "saved": saved_bytes(actor, packs[0]) if made.pp == 1 else None,
        "peak": peak_bytes(update),
        "stage": made.pp_rank,
    }
    return found


def make_sequences(lengths: list[int], vocab_size: int) -> list[TrainSequence]:
    """Prompts that differ, responses trained on in full."""
    rng = np.random.default_rng(0)
    sequences = []
    for index, length in enumerate(lengths):
        mask = np.zeros(length, dtype=bool)
        mask[NUM_PROMPT - 1 : length - 1] = True
        sequences.append(
            TrainSequence(
                uid=f"problem/{index}",
                token_ids=rng.integers(0, vocab_size, length),
                loss_mask=mask,
                advantages=np.full(length, (-1.0) ** index, dtype=np.float32),
                rollout_logprobs=np.zeros(length, dtype=np.float32),
                token_versions=np.where(mask, 0, -1),
            )
        )
    return sequences


def state_bytes(actor: Actor) -> dict[str, int]:
    """Device memory that each part gives up when the actor leaves, which it comes back from."""
    offloader = Offloader(actor.chunks, actor.optimizer, actor.device)
    left = {part: offloader.leave(part) for part in PARTS}
    offloader.enter(*PARTS)
    return left


def rows_to_experts(actor: Actor, batch: PackedBatch) -> list[int]:
    """Copies of tokens that this rank's experts are sent, layer by layer."""
    counts: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
        for module in actor.chunks[0].modules()
        if isinstance(module, SequentialMLP)
    ]
    with torch.no_grad():
        run_model(actor.chunks[0], batch)
    for hook in hooks:
        hook.remove()
    return counts


def saved_bytes(actor: Actor, batch: PackedBatch) -> int:
    """Bytes of distinct memory that autograd keeps after one micro-batch's forward, parameters left out."""
    own = {p.untyped_storage()._cdata for chunk in actor.chunks for p in chunk.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor  # alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run_model(actor.chunks[0], batch)
    assert output is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def peak_bytes(update: Any) -> int:
    """The most that torch's allocator had given out at once during `update`, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak
