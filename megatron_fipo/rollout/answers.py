"""The JSON that goes to SGLang's /generate and what comes back, checked before anybody believes it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_fipo.types import Completion, FinishReason, GenerateRequest

_SHOWN_CHARS = 200
_ROUNDING = 1e-3  # how far above 0 rounding may lift a log-prob
_HUGE = 1e30  # nothing a model gives, and still far from fp32's end


class BadAnswer(ValueError):
    """An engine's answer that must not be trained on; the message says which request and what is wrong."""


def request_ids(count: int) -> list[str]:
    """New names for the requests of one call: an answer to any other call, or to another of its requests, shows."""
    call = secrets.token_hex(8)
    return [f"{call}-{index}" for index in range(count)]


def generate_payload(requests: Sequence[GenerateRequest], ids: Sequence[str], *, seeded: bool) -> dict[str, Any]:
    """One /generate call for all requests, so that they reach SGLang's scheduler together. `ids`: `request_ids`.
    `seeded`: send the seeds."""
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
        "rid": list(ids),
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


def score_payload(token_ids: Sequence[np.ndarray], ids: Sequence[str]) -> dict[str, Any]:
    """A /generate call for the log-probs of the tokens given."""
    return {
        "input_ids": [tokens.tolist() for tokens in token_ids],
        "rid": list(ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def read_completions(
    requests: Sequence[GenerateRequest], ids: Sequence[str], answer: Any, weight_version: int, vocab_size: int
) -> list[Completion]:
    """The completions in an answer of /generate, in request order. BadAnswer if anything about them is off."""
    return [
        _read_completion(request, item, weight_version, vocab_size)
        for request, item in zip(requests, _as_items(answer, ids), strict=True)
    ]


def read_scores(
    token_ids: Sequence[np.ndarray], ids: Sequence[str], answer: Any, weight_version: int
) -> list[np.ndarray]:
    """The log-probs in an answer to `score_payload`: [L] fp32 each, entry i about token i + 1, the last entry 0."""
    scores = []
    for index, (tokens, item) in enumerate(zip(token_ids, _as_items(answer, ids), strict=True)):
        where = f"sequence {index}"
        meta = _field(item, "meta_info", dict, where)
        pairs = _pairs(_field(meta, "input_token_logprobs", list, where), where)
        if [token for _, token in pairs] != tokens.tolist():
            raise BadAnswer(f"{where}: {len(pairs)} tokens came back scored, not the {len(tokens)} sent")
        _check_version(meta, weight_version, where)
        score = np.zeros(len(tokens), dtype=np.float32)
        score[:-1] = _logprobs([value for value, _ in pairs[1:]], where)
        scores.append(score)
    return scores


def read_checksums(answer: Any, tp_size: int) -> list[dict[str, str]]:
    """What /weights_checker says of each tensor-parallel rank: parameter -> checksum."""
    ranks = _field(_mapping(answer, "the answer"), "ranks", list, "the answer")
    if len(ranks) != tp_size:
        raise BadAnswer(f"{len(ranks)} ranks sent checksums, not {tp_size}")
    checksums = []
    for index, rank in enumerate(ranks):
        where = f"rank {index}"
        sums = _field(_mapping(rank, where), "checksums", dict, where)
        if not sums or not all(isinstance(value, str) for value in sums.values()):
            raise BadAnswer(f"{where}: its checksums are {str(sums)[:_SHOWN_CHARS]}")
        checksums.append(sums)
    return checksums


def _read_completion(
    request: GenerateRequest, item: Mapping[str, Any], weight_version: int, vocab_size: int
) -> Completion:
    where = f"request {request.uid}"
    meta = _field(item, "meta_info", dict, where)
    token_ids = _field(item, "output_ids", list, where)
    pairs = _pairs(_field(meta, "output_token_logprobs", list, where), where)
    if not token_ids:
        raise BadAnswer(f"{where}: no token came back")
    if len(token_ids) > request.sampling.max_response_len:
        raise BadAnswer(
            f"{where}: {len(token_ids)} tokens came back, at most {request.sampling.max_response_len} asked"
        )
    if [token for _, token in pairs] != token_ids:
        raise BadAnswer(f"{where}: {len(pairs)} log-probs do not belong to the {len(token_ids)} tokens")
    if max(token_ids) >= vocab_size:
        raise BadAnswer(f"{where}: token {max(token_ids)} came back, but the model has {vocab_size}")
    for name, count in (("prompt_tokens", len(request.prompt_ids)), ("completion_tokens", len(token_ids))):
        if meta.get(name) != count:
            raise BadAnswer(f"{where}: {name} is {str(meta.get(name))[:_SHOWN_CHARS]}, not {count}")
    logprobs = _logprobs([value for value, _ in pairs], where)
    _check_version(meta, weight_version, where)
    return Completion(
        uid=request.uid,
        token_ids=np.asarray(token_ids, dtype=np.int64),
        logprobs=logprobs,
        finish_reason=_finish_reason(meta, token_ids, where),
        weight_version=weight_version,
    )


def _finish_reason(meta: Mapping[str, Any], token_ids: Sequence[int], where: str) -> FinishReason:
    """A stop is by the token drawn last: SGLang calls it a stop by text, too, where logits were NaN. The length is the
    number of tokens, which SGLang may have made less than what was asked."""
    reason = _field(meta, "finish_reason", dict, where)
    kind = reason.get("type")
    if kind == "stop" and reason.get("matched") == token_ids[-1]:
        return "stop"
    if kind == "length" and reason.get("length") == len(token_ids):
        return "length"
    raise BadAnswer(
        f"{where}: finished by {str(reason)[:_SHOWN_CHARS]}, neither a stop at token {token_ids[-1]} nor the length "
        f"{len(token_ids)}"
    )


def _check_version(meta: Mapping[str, Any], wanted: int, where: str) -> None:
    """All tokens must have been drawn under the version wanted."""
    spans = meta.get("weight_versions") or []
    if not isinstance(spans, list):
        raise BadAnswer(f"{where}: weight_versions is {str(spans)[:_SHOWN_CHARS]}, not a list")
    found = {str(meta.get("weight_version"))} | {str(_mapping(span, where).get("version")) for span in spans}
    if found != {str(wanted)}:
        raise BadAnswer(f"{where}: generated by weight version {', '.join(sorted(found))}, not {wanted}")


def _logprobs(values: list[Any], where: str) -> np.ndarray:
    """[R] fp32. JSON has no NaN: SGLang's encoder writes null for it."""
    for index, value in enumerate(values):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not -_HUGE < value <= _ROUNDING:  # which NaN is not
            raise BadAnswer(
                f"{where}: the log-prob at position {index} is {str(value)[:_SHOWN_CHARS]}, not a finite number <= 0"
            )
    return np.asarray(values, dtype=np.float32)


def _pairs(triples: list[Any], where: str) -> list[tuple[Any, int]]:
    """(log-prob, token) of each [log-prob, token, text]."""
    for triple in triples:
        if not isinstance(triple, list) or len(triple) < 2 or not _is_token(triple[1]):
            raise BadAnswer(f"{where}: a log-prob is {str(triple)[:_SHOWN_CHARS]}, not [log-prob, token, text]")
    return [(triple[0], triple[1]) for triple in triples]


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _as_items(answer: Any, ids: Sequence[str]) -> list[Mapping[str, Any]]:
    """One answer per request, each naming the request it belongs to."""
    items = answer if isinstance(answer, list) else [answer]
    if len(items) != len(ids):
        raise BadAnswer(f"{len(items)} answers came back to {len(ids)} requests")
    for index, (item, wanted) in enumerate(zip(items, ids, strict=True)):
        where = f"answer {index}"
        found = _field(_mapping(item, where), "meta_info", dict, where).get("id")
        if found != wanted:
            raise BadAnswer(f"{where} is about request {str(found)[:_SHOWN_CHARS]!r}, not {wanted!r}")
    return items


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadAnswer(f"{where} is {str(value)[:_SHOWN_CHARS]!r}, not a mapping")
    return value


def _field(item: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = item.get(name)
    if not isinstance(value, kind):
        raise BadAnswer(f"{where}: {name} is {str(value)[:_SHOWN_CHARS]!r}, not a {kind.__name__}")
    return value
