"""Tiny random Hugging Face models of every family, and batches with everything that goes wrong in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from megatron_fipo.types import TrainSequence

FAMILIES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}
VOCAB = 131  # divides by nothing: the vocabulary is padded under tensor parallelism


def make_model(family: str, *, tied: bool, seed: int = 0, **fields: Any) -> Any:
    """4 layers, 4 heads in 2 groups, weights large enough that every part matters; fp32, eval mode. `fields` are the
    configuration's."""
    config_class, model_class = FAMILIES[family]
    extra: dict[str, Any] = {"head_dim": 12} if family.startswith("qwen3") else {}
    if family == "qwen3_moe":
        extra |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    usual = {
        "vocab_size": VOCAB,
        "hidden_size": 40,
        "intermediate_size": 88,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
    }
    config = config_class(**{**usual, **extra, **fields})
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.2 * torch.randn_like(parameter) + (1.0 if "norm" in name else 0.0))
            else:
                parameter.mul_(4.0)
    return model


def save_model(directory: Path, family: str, *, tied: bool, seed: int = 0) -> Any:
    """`make_model`, also saved as safetensors in `directory`."""
    model = make_model(family, tied=tied, seed=seed)
    model.save_pretrained(directory)
    return model


# (prompt, response) of the sequences from the twelfth on. Cut over two ranks, the first leaves one of them without
# response tokens and ends on a boundary without padding, as does the second, all of whose pieces hold response tokens.
CUT_SEQUENCES = ((13, 3), (1, 7), (6, 1), (5, 7))


def make_sequences(num: int, *, seed: int = 0) -> list[TrainSequence]:
    """Sequences of odd lengths: masked prefixes, holes, an empty response, a response of one token, both signs of A."""
    rng = np.random.default_rng(seed)
    sequences: list[TrainSequence] = []
    num_prompt = 0
    for i in range(num):
        prompt, response = int(rng.integers(1, 9)), int(rng.integers(2, 23))
        shares_prompt = i in (4, 5, 8)  # with the sequence before
        if shares_prompt:
            prompt = num_prompt
        if i == 1:
            response = 1
        if 12 <= i < 12 + len(CUT_SEQUENCES):
            prompt, response = CUT_SEQUENCES[i - 12]
        length = prompt + response
        mask = np.zeros(length, dtype=bool)
        mask[prompt - 1 : length - 1] = True
        if response > 6:
            mask[prompt + 2 : prompt + 4] = False
        if i == 10:
            mask[: prompt + 1] = False  # the response begins with a hole
        if i == 2:
            mask[:] = False
        token_ids = rng.integers(0, VOCAB, length)
        if shares_prompt:
            token_ids[:prompt] = sequences[-1].token_ids[:prompt]
        num_prompt = prompt
        sequences.append(
            TrainSequence(
                uid=f"problem/{i}",
                token_ids=token_ids,
                loss_mask=mask,
                advantages=np.full(length, (-1.0) ** i * (0.3 + 0.1 * i), dtype=np.float32),
                rollout_logprobs=np.zeros(length, dtype=np.float32),
                token_versions=np.where(mask, 0, -1),
            )
        )
    return sequences


def make_old_logprobs(model: Any, sequences: list[TrainSequence], *, seed: int = 0) -> list[torch.Tensor]:
    """The model's own log-probs, shifted by noise; three sequences with A < 0 get ratios beyond the dual clip."""
    generator = torch.Generator().manual_seed(seed)
    shifted = []
    for i, sequence in enumerate(sequences):
        logprobs = hf_logprobs(model, sequence).detach()
        shift = 0.2 * torch.randn(logprobs.shape, generator=generator)
        if i in (3, 7, 13):
            shift[-8:] += 3.0  # ratios near e^3 > 10
        shifted.append(logprobs - shift)
    return shifted


def with_rollout_logprobs(
    sequences: list[TrainSequence], old_logprobs: list[torch.Tensor], *, seed: int = 0
) -> list[TrainSequence]:
    """An engine that is 0.3 off the trainer: enough that every bound of a correction is met."""
    rng = np.random.default_rng(seed)
    changed = []
    for sequence, old in zip(sequences, old_logprobs, strict=True):
        noisy = old.numpy() + 0.3 * rng.standard_normal(len(old)).astype(np.float32)
        changed.append(replace(sequence, rollout_logprobs=np.where(sequence.loss_mask, noisy, np.float32(0))))
    return changed


def hf_logits(model: Any, sequence: TrainSequence) -> torch.Tensor:
    """[L, V] of one sequence, without any packing."""
    return model(torch.from_numpy(sequence.token_ids)[None]).logits[0]


def hf_logprobs(model: Any, sequence: TrainSequence) -> torch.Tensor:
    """[L] log-probs of the next token, 0 where the mask is False; differentiable."""
    tokens = torch.from_numpy(sequence.token_ids)
    rows = hf_logits(model, sequence).log_softmax(-1)
    labels = torch.cat([tokens[1:], tokens[:1]])
    mask = torch.from_numpy(sequence.loss_mask)
    return torch.where(mask, rows.gather(1, labels[:, None])[:, 0], 0.0)


def published(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names that checkpoints are published with: transformers 5 fuses all experts of a layer."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        prefix, _, fused = name.partition(".experts.")
        for expert, part in enumerate(tensor if fused else ()):
            if fused == "gate_up_proj":
                gate, up = part.chunk(2)
                found[f"{prefix}.experts.{expert}.gate_proj.weight"] = gate
                found[f"{prefix}.experts.{expert}.up_proj.weight"] = up
            else:
                found[f"{prefix}.experts.{expert}.{fused}.weight"] = part
        if not fused:
            found[name] = tensor
    return found
