"""Whether a Megatron checkpoint and a Hugging Face directory are the same model: both answer the same text, in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from torch import Tensor

from megatron_fipo.actor.checkpoint_loading import load_sharded
from megatron_fipo.actor.megatron_weights import MegatronWeights
from megatron_fipo.actor.model import transformer_config
from megatron_fipo.actor.setup import initialize_model_parallel, shut_down
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights.architecture import Architecture, read_architecture, to_gpt_model_fields
from megatron_fipo.weights.mapping import EMBEDDING
from megatron_fipo.weights.stored_names import EXTRA_STATE, places_to_write

TIMEOUT_MINUTES = 10


@dataclass(frozen=True)
class LogitDelta:
    """How far two models are apart on a text."""

    num_tokens: int
    max_abs_delta: float  # of a logit
    max_kl: float  # of a token's distribution, nats; from the Hugging Face model's to Megatron's


def compare_logits(hf_dir: str | Path, checkpoint: Path, token_ids: Sequence[int]) -> LogitDelta:
    """Run the model in `hf_dir` in transformers, then the one in the torch_dist directory `checkpoint` in megatron-core
    (its local layers), both in fp32 on the CPU, on `token_ids`. The patches must be in force."""
    tokens = torch.tensor(token_ids)
    arch = read_architecture(hf_dir)
    theirs = hf_logits(hf_dir, tokens)
    ours = megatron_logits(checkpoint, arch, tokens)
    expected, found = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1)
    return LogitDelta(len(tokens), float((theirs - ours).abs().max()), float(kl.max()))


def hf_logits(hf_dir: str | Path, tokens: Tensor) -> Tensor:
    """[L, V] fp32, of transformers' model."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.float32, local_files_only=True, experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(tokens[None]).logits[0].float()


def megatron_logits(checkpoint: Path, arch: Architecture, tokens: Tensor) -> Tensor:
    """[L, V] fp32, of megatron-core's model in a job of this process alone."""
    stored = MegatronWeights(checkpoint, arch).stored
    padded_vocab = stored.shape(places_to_write(EMBEDDING, arch)[0].key)[0]
    keys = {
        "non_homogeneous_layers": any(key.startswith("decoder.layers.0.") for key in stored.tensors),
        "singleton_local_shards": any(key.endswith("linear_fc1.weight_w") for key in stored.tensors),
    }
    with _alone() as layout:
        model = plain_model(arch, layout, padded_vocab)
        wanted = model.sharded_state_dict(metadata=keys)
        state = {"model": {name: part for name, part in wanted.items() if not name.endswith(EXTRA_STATE)}}
        loaded = load_sharded(state, checkpoint, dist.distributed_c10d._get_default_group(), is_foreign=True)
        left = model.load_state_dict(loaded["model"], strict=False)
        assert not left.unexpected_keys, left
        assert all(name.endswith(EXTRA_STATE) for name in left.missing_keys), left  # empty where layers are local
        return full_logits(model, tokens)[:, : arch.vocab_size]


def plain_model(arch: Architecture, layout: ParallelLayout, padded_vocab: int, **fields: Any) -> GPTModel:
    """megatron-core's own model with its local layers, in fp32 on the CPU; `fields` are GPTModel's."""
    config = transformer_config(arch, layout, params_dtype=torch.float32, device=torch.device("cpu"), overrides={})
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab,
        **{**to_gpt_model_fields(arch), **fields},
    )
    return model.eval()


def full_logits(model: GPTModel, tokens: Tensor) -> Tensor:
    """[L, V_padded] of one stage that holds the whole model."""
    length = len(tokens)
    masked = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        logits: Tensor = model(tokens[None], torch.arange(length)[None], masked)
    return logits[0]


@contextmanager
def _alone() -> Iterator[ParallelLayout]:
    layout = ParallelLayout()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        initialize_model_parallel(layout, seed=0, timeout_minutes=TIMEOUT_MINUTES)
        yield layout
    finally:
        shut_down()
