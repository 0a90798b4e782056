"""What goes wrong with an engine's answers: each fault takes a moment in [0, 1), which says where in the answer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engines.fault_proxy import Act, Exchange, Fault, any_request
from engines.wire_faults import (
    HEAD,
    bytes_only,
    close_at_once,
    cut,
    drip,
    endless,
    false_gzip,
    gzip_bomb,
    hang_at_once,
    hang_within,
    huge,
    overstated,
    reset_at_once,
    reset_within,
    understated,
    whole,
)

Spoil = Callable[[list[dict[str, Any]], float], Any]
"""(the answers, which it may change; moment) -> what is sent in their place."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault. `on_answer`: it changes the answer to a batch; else it may strike any request. The fixed choice
    of faults has `in_short`, or all variants; all faults have `other_moments`, too."""

    name: str  # the line of the table
    variants: dict[str, Callable[[float], Act]]
    on_answer: bool
    lasts: bool = False
    refuses: bool = False
    needs_timeout: bool = False  # nothing but the time limit of the request ends it
    in_short: tuple[str, ...] = ()
    other_moments: tuple[float, ...] = (0.0, 0.999)

    def fault(self, variant: str, moment: float, index: int = 0) -> Fault:
        """`index`: of the request it strikes, for faults that may strike any."""
        matches = is_batch if self.on_answer else any_request
        act = self.variants[variant](moment)
        return Fault(act, matches, 0 if self.on_answer else index, self.lasts, self.refuses)


def is_batch(exchange: Exchange) -> bool:
    """A request for samples or scores."""
    return exchange.path == "/generate" and b'"return_logprob": true' in exchange.body


# ---- what is wrong in an answer


def spoil(change: Spoil) -> Callable[[float], Act]:
    def at(moment: float) -> Act:
        async def act(exchange: Exchange) -> None:
            head, body = await exchange.forward()
            answer = json.loads(body)
            items = answer if isinstance(answer, list) else [answer]
            await exchange.send_body(head, json.dumps(change(items, moment)).encode())

        return act

    return at


def _at(items: list[Any], moment: float) -> Any:
    return items[int(moment * len(items))]


def _triples(item: dict[str, Any]) -> list[list[Any]]:
    """[log-prob, token, text] of every token, of a batch or a score; the score's first token has none."""
    meta = item["meta_info"]
    scored: list[list[Any]] = meta.get("input_token_logprobs") or []
    return meta["output_token_logprobs"] if item.get("output_ids") else scored[1:]


def old_version(items: list[dict[str, Any]], moment: float) -> Any:
    meta = _at(items, moment)["meta_info"]
    meta["weight_version"] = str(int(meta["weight_version"]) - 1)
    return items


def first_version(items: list[dict[str, Any]], moment: float) -> Any:
    for item in items:
        item["meta_info"]["weight_version"] = "0"
    return items


def mixed_versions(items: list[dict[str, Any]], moment: float) -> Any:
    meta = _at(items, moment)["meta_info"]
    meta["weight_versions"] = [{"version": str(int(meta["weight_version"]) - 1), "start": 0, "end": 1}]
    return items


def no_version(items: list[dict[str, Any]], moment: float) -> Any:
    meta = _at(items, moment)["meta_info"]
    del meta["weight_version"]
    meta.pop("weight_versions", None)
    return items


def token_missing(items: list[dict[str, Any]], moment: float) -> Any:
    item = _at(items, moment)
    if item.get("output_ids"):
        del item["output_ids"][int(moment * len(item["output_ids"]))]
    else:
        item["meta_info"]["input_token_logprobs"].pop()
    return items


def logprob_missing(items: list[dict[str, Any]], moment: float) -> Any:
    meta = _at(items, moment)["meta_info"]
    key = "output_token_logprobs" if meta.get("output_token_logprobs") else "input_token_logprobs"
    del meta[key][int(moment * len(meta[key]))]
    return items


def token_too_many(items: list[dict[str, Any]], moment: float) -> Any:
    item = _at(items, moment)
    if item.get("output_ids"):
        for _ in range(100):
            item["output_ids"].append(item["output_ids"][-1])
            item["meta_info"]["output_token_logprobs"].append(item["meta_info"]["output_token_logprobs"][-1])
    else:
        item["meta_info"]["input_token_logprobs"].append([-1.0, 5, None])
    return items


def nothing_drawn(items: list[dict[str, Any]], moment: float) -> Any:
    item = _at(items, moment)
    item["output_ids"] = []
    for key in ("output_token_logprobs", "input_token_logprobs"):
        item["meta_info"][key] = []
    return items


def logprob_is(value: Any) -> Spoil:
    def change(items: list[dict[str, Any]], moment: float) -> Any:
        _at(_triples(_at(items, moment)), moment)[0] = value
        return items

    return change


def token_is(value: Any) -> Spoil:
    def change(items: list[dict[str, Any]], moment: float) -> Any:
        _at(_triples(_at(items, moment)), moment)[1] = value
        return items

    return change


def token_beyond(items: list[dict[str, Any]], moment: float) -> Any:
    """Tokens and log-probs agree on a token that the model has not."""
    item = _at(items, moment)
    index = int(moment * len(item["output_ids"]))
    item["output_ids"][index] = item["meta_info"]["output_token_logprobs"][index][1] = 1 << 20
    if index == len(item["output_ids"]) - 1 and item["meta_info"]["finish_reason"]["type"] == "stop":
        item["meta_info"]["finish_reason"]["matched"] = 1 << 20
    return items


def cut_evenly(items: list[dict[str, Any]], moment: float) -> Any:
    """The last token is lost everywhere but in what is said of the answer."""
    item = max(items, key=lambda item: len(item["output_ids"]))
    item["output_ids"].pop()
    item["meta_info"]["output_token_logprobs"].pop()
    return items


def others_words(items: list[dict[str, Any]], moment: float) -> Any:
    """Under its own name, what was drawn after another prompt."""
    here = int(moment * len(items))
    there = next(i for i, item in enumerate(items) if _prompt_length(item) != _prompt_length(items[here]))
    names = items[here]["meta_info"]["id"], items[there]["meta_info"]["id"]
    items[here], items[there] = items[there], items[here]
    items[here]["meta_info"]["id"], items[there]["meta_info"]["id"] = names
    return items


def _prompt_length(item: dict[str, Any]) -> Any:
    return item["meta_info"]["prompt_tokens"]


def finish_is(reason: Any) -> Spoil:
    def change(items: list[dict[str, Any]], moment: float) -> Any:
        _at(items, moment)["meta_info"]["finish_reason"] = reason
        return items

    return change


def answer_twice(items: list[dict[str, Any]], moment: float) -> Any:
    """One answer stands in the place of another as well."""
    index = int(moment * len(items))
    items[index] = copy.deepcopy(items[index - 1])
    return items


def answers_swapped(items: list[dict[str, Any]], moment: float) -> Any:
    index = int(moment * len(items))
    items[index], items[index - 1] = items[index - 1], items[index]
    return items


def another_id(items: list[dict[str, Any]], moment: float) -> Any:
    _at(items, moment)["meta_info"]["id"] = "of another call"
    return items


KINDS = (
    Kind("engine: refuses connections", {"refuse": reset_at_once}, on_answer=False, lasts=True, refuses=True),
    Kind("engine: hangs", {"at once": hang_at_once, "in its answer": hang_within}, on_answer=False, lasts=True),
    Kind(
        "engine: HTTP 500",
        {
            "500": whole("500 Internal Server Error", b'{"error": "out of memory"}'),
            "503": whole("503 Service Unavailable", b""),
            "404": whole("404 Not Found", b"<html>no such page</html>", b"content-type: text/html\r\n"),
            "302": whole("302 Found", b"", b"location: http://127.0.0.1:1/generate\r\n"),
        },
        on_answer=False,
    ),
    Kind(
        "engine: slow drip",
        {
            "drip": drip(lambda head, body: (len(head), len(head) + len(body))),
            "in its headers": drip(lambda head, body: (0, len(head))),
            "100 again and again": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
            "a header after another": endless(b"HTTP/1.1 200 OK\r\n", b"x-more: more\r\n"),
            "length overstated": overstated,
        },
        on_answer=True,
        needs_timeout=True,
        in_short=("drip",),
        other_moments=(),
    ),
    Kind(
        "engine: truncated JSON",
        {"honest": cut(honest=True), "broken off": cut(honest=False), "length understated": understated},
        on_answer=True,
    ),
    Kind(
        "engine: stale version",
        {
            "the last": spoil(old_version),
            "the first": spoil(first_version),
            "in a span": spoil(mixed_versions),
            "none": spoil(no_version),
        },
        on_answer=True,
    ),
    Kind(
        "engine: wrong length",
        {
            "a token less": spoil(token_missing),
            "a log-prob less": spoil(logprob_missing),
            "tokens too many": spoil(token_too_many),
            "no token": spoil(nothing_drawn),
            "evenly a token less": spoil(cut_evenly),
            "an answer less": spoil(lambda items, moment: items[:-1]),
            "no answer": spoil(lambda items, moment: []),
        },
        on_answer=True,
    ),
    Kind(
        "engine: NaN log-prob",
        {
            "NaN": spoil(logprob_is(float("nan"))),
            "null": spoil(logprob_is(None)),
            "-inf": spoil(logprob_is(-float("inf"))),
            "+inf": spoil(logprob_is(float("inf"))),
            "text": spoil(logprob_is("-0.5")),
            "1e30": spoil(logprob_is(1e30)),
            "0.5": spoil(logprob_is(0.5)),
            "false": spoil(logprob_is(False)),
            "-1e400": spoil(logprob_is(-(10**400))),
        },
        on_answer=True,
    ),
    Kind(
        "engine: duplicate answers",
        {
            "in another's place": spoil(answer_twice),
            "one more": spoil(lambda items, moment: [*items, items[int(moment * len(items))]]),
            "all twice": spoil(lambda items, moment: items * 2),
            "swapped": spoil(answers_swapped),
            "another prompt's": spoil(others_words),
        },
        on_answer=True,
    ),
)
"""Those of the twelve that a proxy can make."""

STRANGER_KINDS = (
    Kind(
        "engine: broken connection",
        {"reset in the answer": reset_within, "reset": reset_at_once, "closed": close_at_once},
        on_answer=True,
    ),
    Kind(
        "engine: strange answer",
        {
            "HTML": whole("200 OK", b"<html><body>captive portal</body></html>", b"content-type: text/html\r\n"),
            "empty": whole("200 OK", b""),
            "no content": bytes_only(b"HTTP/1.1 204 No Content\r\n\r\n"),
            "false gzip": false_gzip,
            "gzip bomb": gzip_bomb,
            "false br": whole("200 OK", b"\x8b\x00\xff" * 100, b"content-encoding: br\r\n"),
            "false chunks": bytes_only(HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n[]\r\n0\r\n\r\n"),
            "error with 200": whole("200 OK", b'{"error": {"message": "no memory", "code": 500}}'),
            "switched": bytes_only(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n"),
            "digits": whole("200 OK", b"[" + b"9" * 10_000 + b"]"),
            "huge": huge,
            "deep": whole("200 OK", b"[" * 100_000),
            "a number": whole("200 OK", b"17"),
            "null": whole("200 OK", b"null"),
            "no HTTP": bytes_only(b"\x00\xff\x13SSH-2.0-what\r\n\r\n"),
            "bad header": bytes_only(b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n"),
            "not UTF-8": whole("200 OK", b'[{"meta_info": "\xff\xfe"}]'),
        },
        on_answer=True,
        other_moments=(),  # they would be the same answers
    ),
    Kind(
        "engine: strange fields",
        {
            "another request's": spoil(another_id),
            "aborted": spoil(finish_is({"type": "abort", "message": "because"})),
            "not finished": spoil(finish_is(None)),
            "stopped by NaN": spoil(finish_is({"type": "stop", "matched": "NaN happened"})),
            "another length": spoil(finish_is({"type": "length", "length": 99})),
            "token beyond": spoil(token_beyond),
            "token -1": spoil(token_is(-1)),
            "token 1.5": spoil(token_is(1.5)),
            "token true": spoil(token_is(True)),
            "items are numbers": spoil(lambda items, moment: list(range(len(items)))),
            "no meta": spoil(lambda items, moment: [{"output_ids": [1]} for _ in items]),
        },
        on_answer=True,
    ),
)
