"""A small transformer in plain PyTorch as the product's loop sees it: an engine that samples, an actor that learns.

Both are the same weights, so a "sync" is only a new version number; log-probs come from two code paths all the same
(key-value cache, teacher forcing), and the loop compares them in every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_fipo.config import CorrectionSettings, PPOSettings
from megatron_fipo.losses import LOSSES
from megatron_fipo.types import Completion, GenerateRequest, TrainSequence

GRADIENT_CLIP = 1.0


class KeyValueCache:
    """Keys and values of all layers, [layers, B, heads, positions, dim of a head] fp32, and how many are filled in."""

    def __init__(self, model: LeapsTransformer, num_rows: int) -> None:
        max_positions, half, _ = model.rotations.shape
        shape = (len(model.blocks), num_rows, model.heads, max_positions, 2 * half)
        self.keys, self.values = torch.empty(shape), torch.empty(shape)
        self.length = 0

    def extended(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new positions' keys and values behind those of the layer; all of them."""
        end = self.length + keys.size(2)
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Forget all but these rows of the batch."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class LeapsTransformer(nn.Module):
    """Decoder with rotary positions, pre-norm blocks and tied embeddings."""

    def __init__(
        self, vocab_size: int, max_positions: int, *, hidden: int = 64, layers: int = 2, heads: int = 2, seed: int
    ) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocab_size, hidden)
        self.blocks = nn.ModuleList(_Block(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.register_buffer("rotations", _rotations(max_positions, hidden // heads), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0.0, hidden**-0.5, generator=generator)

    def forward(self, token_ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """token_ids [B, T] int64 -> logits [B, T, V] fp32.

        With a `cache` (empty at first) the tokens follow those it holds, and theirs are added to it.
        """
        start = 0 if cache is None else cache.length
        # the causal mask knows no past: several tokens at once only at the start
        assert start == 0 or token_ids.size(1) == 1, (start, token_ids.shape)
        rotations = self.rotations[start : start + token_ids.size(1)]
        rows = self.tokens(token_ids)
        for layer, block in enumerate(self.blocks):
            rows = block(rows, rotations, cache, layer)
        if cache is not None:
            cache.length += token_ids.size(1)
        return functional.linear(self.norm(rows), self.tokens.weight)


class _Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, 3 * hidden, bias=False)
        self.down = nn.Linear(3 * hidden, hidden, bias=False)

    def forward(self, rows: Tensor, rotations: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        batch, length, hidden = rows.shape
        qkv = self.qkv(self.norm1(rows)).view(batch, length, 3, self.heads, hidden // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        queries, keys = _rotated(queries, rotations), _rotated(keys, rotations)
        if cache is not None:
            keys, values = cache.extended(layer, keys, values)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=length > 1)
        rows = rows + self.out(attended.transpose(1, 2).reshape(batch, length, hidden))
        return rows + self.down(functional.gelu(self.up(self.norm2(rows))))


def _rotations(max_positions: int, dim: int) -> Tensor:
    """cos and sin of position / 10000^(2 i / dim): [max_positions, dim / 2, 2] fp32 (RoPE, arXiv 2104.09864)."""
    frequencies = 10000.0 ** -(torch.arange(0, dim, 2) / dim)
    angles = torch.arange(max_positions)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def _rotated(heads: Tensor, rotations: Tensor) -> Tensor:
    """heads [B, heads, T, dim], each pair (first half, second half) turned by its position's angle."""
    cos, sin = rotations.unbind(-1)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class LeapsEngine:
    """Draws responses to a batch of prompts of one length. `version` is that of the weights it draws with."""

    def __init__(self, model: LeapsTransformer, end_id: int) -> None:
        self.model = model
        self.end_id = end_id
        self.version = 0

    @torch.no_grad()
    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One response per request, its random numbers made of the request's seed alone.

        Raises ValueError for prompts or sampling settings that differ, and for nucleus or top-k sampling.
        """
        samplings = {request.sampling for request in requests}
        lengths = {len(request.prompt_ids) for request in requests}
        if len(samplings) != 1 or len(lengths) != 1:
            raise ValueError(f"prompts of lengths {lengths} sampled as {samplings}, but one of each can be drawn")
        sampling = samplings.pop()
        if sampling.top_p != 1.0 or sampling.top_k != -1 or sampling.temperature <= 0:
            raise ValueError(f"{sampling}: this engine samples from the whole distribution at a temperature > 0")
        draws = torch.from_numpy(
            np.stack([np.random.default_rng(r.seed).random(sampling.max_response_len) for r in requests])
        )
        tokens, logprobs, lengths_drawn = self._draw(
            torch.from_numpy(np.stack([request.prompt_ids for request in requests])), draws, sampling.temperature
        )
        return [
            Completion(
                uid=request.uid,
                token_ids=tokens[i, :length].numpy(),
                logprobs=logprobs[i, :length].numpy(),
                finish_reason="stop" if tokens[i, length - 1] == self.end_id else "length",
                weight_version=self.version,
            )
            for i, (request, length) in enumerate(zip(requests, lengths_drawn.tolist()))
        ]

    def _draw(self, prompts: Tensor, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, R] int64, log-probs [B, R] fp32 and lengths [B]; draws [B, R] float64 are uniform in [0, 1)."""
        num_rows, longest = draws.shape
        tokens = torch.zeros(num_rows, longest, dtype=torch.int64)
        logprobs = torch.zeros(num_rows, longest)
        lengths = torch.full((num_rows,), longest)
        cache = KeyValueCache(self.model, num_rows)
        computed = torch.arange(num_rows)  # the rows that are still computed
        inputs = prompts
        for place in range(longest):
            rows = (self.model(inputs, cache)[:, -1] / temperature).log_softmax(-1)
            cumulative = rows.double().exp().cumsum(-1)
            drawn = (cumulative <= draws[computed, place, None] * cumulative[:, -1:]).sum(-1)
            tokens[computed, place] = drawn
            logprobs[computed, place] = rows.gather(1, drawn[:, None])[:, 0]
            ended = computed[drawn == self.end_id]
            lengths[ended] = lengths[ended].clamp(max=place + 1)
            unfinished = lengths[computed] > place + 1
            if not unfinished.any():
                break
            if 4 * int(unfinished.sum()) < 3 * len(computed):
                computed, drawn = computed[unfinished], drawn[unfinished]
                cache.keep(unfinished)
            inputs = drawn[:, None]
        return tokens, logprobs, lengths


class LeapsActor:
    """The loop's Actor over a LeapsTransformer: teacher-forced log-probs, and updates with the product's losses."""

    def __init__(self, model: LeapsTransformer, *, lr: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def old_logprobs(self, mini_batches: Sequence[Sequence[TrainSequence]]) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probs and entropies [L] fp32 of every sequence, computed in the batches of the updates."""
        logprobs: list[Tensor] = []
        entropies: list[Tensor] = []
        for sequences in mini_batches:
            batch_logprobs, batch_entropies = self._logprobs(sequences)
            lengths = [len(sequence.token_ids) for sequence in sequences]
            logprobs += [row[:length].clone() for row, length in zip(batch_logprobs, lengths)]
            entropies += [row[:length].clone() for row, length in zip(batch_entropies, lengths)]
        return logprobs, entropies

    def reference_logprobs(self, mini_batches: Sequence[Sequence[TrainSequence]]) -> list[Tensor]:
        """There is no reference model: the loop asks for it with a KL term only. Raises ValueError."""
        raise ValueError("the study's actor keeps no reference weights: --kl-coef must be 0")

    def update(
        self,
        sequences: Sequence[TrainSequence],
        old_logprobs: Sequence[Tensor],
        *,
        algorithm: str,
        settings: PPOSettings,
        correction: CorrectionSettings,
        reference_logprobs: Sequence[Tensor],
    ) -> dict[str, float]:
        """One optimizer step. Returns the loss's metrics, and beside them the mean |Future-KL| of response tokens.

        Raises ValueError for a correction or a KL term, which this actor does not have, and for a loss or gradient
        that is not finite.
        """
        if correction != CorrectionSettings() or len(reference_logprobs):
            raise ValueError(f"the study's actor has the plain losses alone, but was asked for {correction}")
        logprobs, _ = self._logprobs(sequences)
        mask = _padded([torch.from_numpy(sequence.loss_mask) for sequence in sequences])
        advantages = _padded([torch.from_numpy(sequence.advantages) for sequence in sequences])
        loss, info = LOSSES[algorithm](logprobs, _padded(old_logprobs), advantages, mask, settings)
        self.optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP))
        if not (torch.isfinite(loss) and np.isfinite(norm)):
            raise ValueError(f"loss {float(loss.detach())} and gradient norm {norm} must be finite")
        self.optimizer.step()
        metrics: dict[str, float] = {name: value for name, value in info.items() if isinstance(value, float)}
        return metrics | {
            "future_kl_abs_mean": float(info["future_kl"][mask].abs().mean()),
            "num_kept": float(info["num_kept"]),
            "grad_norm": norm,
            "lr": self.optimizer.param_groups[0]["lr"],
            "skipped": 0.0,
        }

    def _logprobs(self, sequences: Sequence[TrainSequence]) -> tuple[Tensor, Tensor]:
        """Of the next token at every position, and the entropy there: [B, longest] fp32, 0 outside the loss mask."""
        ids = _padded([torch.from_numpy(sequence.token_ids) for sequence in sequences])
        mask = _padded([torch.from_numpy(sequence.loss_mask) for sequence in sequences])
        rows = self.model(ids).log_softmax(-1)
        labels = functional.pad(ids[:, 1:], (0, 1))
        logprobs = rows.gather(2, labels[:, :, None])[:, :, 0] * mask
        entropies = -(rows.detach().exp() * rows.detach()).sum(-1) * mask
        return logprobs, entropies


def warm_up(
    model: LeapsTransformer, batches: Iterable[tuple[np.ndarray, np.ndarray]], *, num_batches: int, lr: float
) -> list[float]:
    """Supervised training; a batch is (token ids [B, L] int64, loss mask [B, L] bool, aligned to the predicting
    position). The learning rate falls along a cosine. Returns the loss of every batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for number, (token_ids, loss_mask) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * number / num_batches)))
        ids = torch.from_numpy(token_ids)
        logits = model(ids[:, :-1])
        mask = torch.from_numpy(loss_mask[:, :-1])
        loss = functional.cross_entropy(logits[mask], ids[:, 1:][mask])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def num_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())


def _padded(rows: Sequence[Any]) -> Tensor:
    """Rows [L_i] laid out as [B, longest], zeros behind."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
