"""What quantisation costs: how far two models' predictions differ on text, and greedy answers of one on CPU or GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.types import Completion, FinishReason, GenerateRequest

ROWS_AT_ONCE = 256  # tokens whose distributions over the vocabulary are held several times
UNKNOWN_VERSION = 0  # the weights of a completion that no engine made


@dataclass(frozen=True)
class Fidelity:
    """Means over all predicted tokens but `max_logit_difference`. KL is in nats, of the quantised model's
    distribution from the original's."""

    num_tokens: int
    kl: float
    max_logit_difference: float
    same_likeliest: float  # share of tokens where both models hold the same one likeliest
    perplexity_before: float
    perplexity_after: float


@torch.no_grad()
def compare(before: Any, after: Any, batches: Iterable[Tensor]) -> Fidelity:
    """Run both models on the token ids [B, L] of every batch. Raises ValueError when there is no token to predict, and
    when a model's predictions are no numbers."""
    sums = torch.zeros(4, dtype=torch.float64)  # KL, same, -log p before, -log p after
    num_tokens, largest = 0, 0.0
    for token_ids in batches:
        if token_ids.shape[1] < 2:
            continue
        logits = [model(token_ids, use_cache=False).logits[:, :-1].flatten(0, 1) for model in (before, after)]
        targets = token_ids[:, 1:].reshape(-1, 1)
        for start in range(0, len(targets), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            one, other = (values[rows].float() for values in logits)
            largest = max(largest, float((one - other).abs().max()))
            p, q = one.log_softmax(-1), other.log_softmax(-1)
            found = (
                (p.exp() * (p - q)).sum(),
                (one.argmax(-1) == other.argmax(-1)).sum(),
                -p.gather(-1, targets[rows]).sum(),
                -q.gather(-1, targets[rows]).sum(),
            )
            sums += torch.stack(found).to("cpu", torch.float64)
        num_tokens += targets.numel()
    if not num_tokens:
        raise ValueError("the calibration text has no prompt of two tokens or more: there is nothing to predict")
    kl, same, loss_before, loss_after = (sums / num_tokens).tolist()
    for model, loss in (("the model", loss_before), ("the quantised model", loss_after)):
        if not np.isfinite(loss):
            raise ValueError(f"{model}'s predictions of the calibration text are not finite: nothing was written")
    return Fidelity(num_tokens, kl, largest, same, float(np.exp(loss_before)), float(np.exp(loss_after)))


def greedy(
    model: Any, tokenizer: Any, batch_size: int, finished: Callable[[int], None] = lambda count: None
) -> Callable[[Sequence[GenerateRequest]], list[Completion]]:
    """An engine made of transformers' own generation: the likeliest token each time, whatever a request's temperature.

    Log-probs are zeros: nobody reads them. `finished` is told how many more requests are answered.
    """
    ends = end_tokens(model, tokenizer)

    def generate(requests: Sequence[GenerateRequest]) -> list[Completion]:
        ordered = sorted(requests, key=lambda request: len(request.prompt_ids))  # little padding in each batch
        completions = []
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            answers = continue_greedily(
                model, [r.prompt_ids.tolist() for r in batch], max(r.sampling.max_response_len for r in batch), ends
            )
            for request, answer in zip(batch, answers, strict=True):
                token_ids = np.asarray(answer[: request.sampling.max_response_len], dtype=np.int64)
                stopped = bool(len(token_ids)) and int(token_ids[-1]) in ends
                logprobs = np.zeros(len(token_ids), dtype=np.float32)
                reason: FinishReason = "stop" if stopped else "length"
                completions.append(Completion(request.uid, token_ids, logprobs, reason, UNKNOWN_VERSION))
            finished(len(batch))
        return completions

    return generate


@torch.no_grad()
def continue_greedily(
    model: Any, prompts: Sequence[Sequence[int]], max_response_len: int, ends: Sequence[int]
) -> list[list[int]]:
    """The responses to a batch of prompts, with the token of `ends` that ended each, if one did."""
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    padded = torch.full((len(prompts), longest), ends[0], device=model.device)
    mask = torch.zeros_like(padded)
    for i, prompt in enumerate(prompts):  # to the left, so that all responses begin in one place
        padded[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=max_response_len, do_sample=False, eos_token_id=list(ends), pad_token_id=ends[0]
    )
    output = model.generate(input_ids=padded, attention_mask=mask, generation_config=config)
    responses: list[list[int]] = []
    for row in output[:, longest:].tolist():
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        responses.append(row[:length])
    return responses


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response: the generation config's and the tokenizer's. Raises ValueError for none."""
    configured = model.generation_config.eos_token_id
    found = [configured] if isinstance(configured, int) else list(configured or [])
    found += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if not found:
        raise ValueError("neither generation_config.json nor the tokenizer in --hf-checkpoint names an end token")
    return list(dict.fromkeys(found))
