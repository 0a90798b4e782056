"""The JSON that goes to SGLang's /generate and what comes back, checked before anybody believes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_fipo.types import Completion, FinishReason, GenerateRequest


class BadAnswer(ValueError):
    """An engine's answer that must not be trained on; the message says which request and what is wrong."""


def generate_payload(requests: Sequence[GenerateRequest], *, seeded: bool) -> dict[str, Any]:
    """One /generate call for all requests, so that they reach SGLang's scheduler together. `seeded`: send the seeds."""
    sampling = []
    for request in requests:
        params: dict[str, Any] = {
            "max_new_tokens": request.sampling.max_response_len,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "top_k": request.sampling.top_k,
        }
        if seeded:
            params["sampling_seed"] = request.seed
        sampling.append(params)
    return {
        "input_ids": [request.prompt_ids.tolist() for request in requests],
        "sampling_params": sampling,
        "return_logprob": True,
    }


def prefix_payload(requests: Sequence[GenerateRequest]) -> dict[str, Any] | None:
    """A /generate call that only fills the prefix cache with each prompt that several requests share; None if there is
    no such prompt."""
    counts: dict[bytes, int] = {}
    for request in requests:
        counts[request.prompt_ids.tobytes()] = counts.get(request.prompt_ids.tobytes(), 0) + 1
    shared = [np.frombuffer(key, dtype=np.int64).tolist() for key, count in counts.items() if count > 1]
    if not shared:
        return None
    return {"input_ids": shared, "sampling_params": {"max_new_tokens": 0, "temperature": 0.0}}


def score_payload(token_ids: Sequence[np.ndarray]) -> dict[str, Any]:
    """A /generate call for the log-probs of the tokens given."""
    return {
        "input_ids": [ids.tolist() for ids in token_ids],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def read_completions(requests: Sequence[GenerateRequest], answer: Any, weight_version: int) -> list[Completion]:
    """The completions in an answer of /generate, in request order. BadAnswer if anything about them is off."""
    return [
        _read_completion(request, item, weight_version)
        for request, item in zip(requests, _as_items(answer, len(requests)), strict=True)
    ]


def read_scores(token_ids: Sequence[np.ndarray], answer: Any) -> list[np.ndarray]:
    """The log-probs in an answer to `score_payload`: [L] fp32 each, entry i about token i + 1, the last entry 0."""
    scores = []
    for index, (ids, item) in enumerate(zip(token_ids, _as_items(answer, len(token_ids)), strict=True)):
        triples = _field(item["meta_info"], "input_token_logprobs", list, f"sequence {index}")
        if [triple[1] for triple in triples] != ids.tolist():
            raise BadAnswer(f"sequence {index}: {len(triples)} tokens came back scored, not the {len(ids)} sent")
        score = np.zeros(len(ids), dtype=np.float32)
        score[:-1] = _finite([triple[0] for triple in triples[1:]], f"sequence {index}")
        scores.append(score)
    return scores


def _read_completion(request: GenerateRequest, item: Mapping[str, Any], weight_version: int) -> Completion:
    where = f"request {request.uid}"
    meta = _field(item, "meta_info", dict, where)
    token_ids = _field(item, "output_ids", list, where)
    triples = _field(meta, "output_token_logprobs", list, where)
    if not token_ids:
        raise BadAnswer(f"{where}: no token came back")
    if len(token_ids) > request.sampling.max_response_len:
        raise BadAnswer(
            f"{where}: {len(token_ids)} tokens came back, at most {request.sampling.max_response_len} asked"
        )
    if [triple[1] for triple in triples] != token_ids:
        raise BadAnswer(f"{where}: {len(triples)} log-probs do not belong to the {len(token_ids)} tokens")
    logprobs = _finite([triple[0] for triple in triples], where)
    _check_version(meta, weight_version, where)
    return Completion(
        uid=request.uid,
        token_ids=np.asarray(token_ids, dtype=np.int64),
        logprobs=logprobs,
        finish_reason=_finish_reason(meta, where),
        weight_version=weight_version,
    )


def _finish_reason(meta: Mapping[str, Any], where: str) -> FinishReason:
    reason = _field(meta, "finish_reason", dict, where)
    kind = reason.get("type")
    if kind == "stop":
        return "stop"
    if kind == "length":
        return "length"
    raise BadAnswer(f"{where}: finished by {reason}, neither stop nor length")


def _check_version(meta: Mapping[str, Any], wanted: int, where: str) -> None:
    """All tokens must have been drawn under the version wanted."""
    spans = meta.get("weight_versions") or []
    found = {str(meta.get("weight_version"))} | {str(span["version"]) for span in spans}
    if found != {str(wanted)}:
        raise BadAnswer(f"{where}: generated by weight version {', '.join(sorted(found))}, not {wanted}")


def _finite(values: list[Any], where: str) -> np.ndarray:
    """[R] fp32. JSON has no NaN: SGLang's encoder writes null for it."""
    bad = [index for index, value in enumerate(values) if value is None or not math.isfinite(value)]
    if bad:
        raise BadAnswer(f"{where}: the log-prob at position {bad[0]} is {values[bad[0]]}, not a finite number")
    return np.asarray(values, dtype=np.float32)


def _as_items(answer: Any, count: int) -> list[Mapping[str, Any]]:
    items = answer if isinstance(answer, list) else [answer]
    if len(items) != count:
        raise BadAnswer(f"{len(items)} answers came back to {count} requests")
    return items


def _field(item: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = item.get(name)
    if not isinstance(value, kind):
        raise BadAnswer(f"{where}: {name} is {value!r}, not a {kind.__name__}")
    return value
