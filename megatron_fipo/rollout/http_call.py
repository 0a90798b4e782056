"""One request to an engine over HTTP: bounded in time and size, its answer real JSON or an error."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from megatron_fipo.rollout.engine import EngineAddress

_POLL_S = 0.25
_CHUNK_BYTES = 1 << 20
_MAX_ANSWER_BYTES = 1 << 31
_SHOWN_CHARS = 2000


class CallFailed(Exception):
    """A request came to nothing. The message goes behind an engine's name: "gave no answer to /x within 5 s"."""


class ConnectionBroke(CallFailed):
    """The connection broke, or there was none: the engine may be about to end."""


@dataclass(frozen=True)
class Call:
    """What to ask and how long to wait, from the first byte sent to the last one received."""

    path: str
    payload: dict[str, Any] | None  # None: a GET
    timeout_s: float
    answer: Literal["json", "text", "done"] = "json"
    """done: JSON that says so, as SGLang's answers to what changes its weights do."""


async def call(address: EngineAddress, what: Call, check_alive: Callable[[], None]) -> Any:
    """Send a request and return its answer's JSON (or text).

    `check_alive` is called meanwhile and ends the wait by raising. Raises CallFailed for a broken connection, an answer
    that is late, however it drips in, too long, of another status than 200, or not what `what.answer` says.
    """
    path = what.path.partition("?")[0]
    deadline = time.monotonic() + what.timeout_s
    task = asyncio.create_task(_send(address, what))
    try:
        while not (await asyncio.wait({task}, timeout=min(_POLL_S, max(0.0, deadline - time.monotonic()))))[0]:
            check_alive()
            if time.monotonic() >= deadline:
                raise CallFailed(f"gave no answer to {path} within {what.timeout_s:g} s")
        status, body = task.result()
    except (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError) as error:
        raise ConnectionBroke(f"broke the connection during {path}: {error!r}") from error
    except ValueError as error:  # aiohttp's for a malformed header
        raise CallFailed(f"answered {path} with what is no HTTP: {error!r}") from error
    finally:
        task.cancel()
    text = body.decode(errors="replace")
    if status != 200:
        raise CallFailed(f"answered {path} with status {status}: {text[:_SHOWN_CHARS]}")
    if what.answer == "text":
        return text
    answer = _parsed(text, path)
    if what.answer == "done" and not _says_done(answer):
        raise CallFailed(f"did not say that it did {path}, but {str(answer)[:_SHOWN_CHARS]}")
    return answer


async def _send(address: EngineAddress, what: Call) -> tuple[int, bytes]:
    """Status and body."""
    headers = {"Authorization": f"Bearer {address.api_key}"}
    timeout = aiohttp.ClientTimeout(total=None)  # `call` keeps the time
    method = "GET" if what.payload is None else "POST"
    path = what.path.partition("?")[0]
    async with (
        aiohttp.ClientSession(headers=headers, timeout=timeout, trust_env=False) as session,
        session.request(method, address.url + what.path, json=what.payload, allow_redirects=False) as response,
    ):
        body = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            body += chunk
            if len(body) > _MAX_ANSWER_BYTES:
                raise CallFailed(f"answered {path} with more than {_MAX_ANSWER_BYTES} bytes")
        return response.status, bytes(body)


def _says_done(answer: Any) -> bool:
    return isinstance(answer, dict) and (answer.get("success") is True or answer.get("status") == "ok")


def _parsed(text: str, path: str) -> Any:
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text)} characters)"
        raise CallFailed(f"answered {path} with no JSON ({error!s:.200}): {shown!r}") from error
    if isinstance(answer, dict) and (answer.get("success") is False or "error" in answer):
        raise CallFailed(f"refused {path}: {str(answer)[:_SHOWN_CHARS]}")
    return answer
