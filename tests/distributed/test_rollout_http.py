"""Requests to an engine that answers wrongly, late, in part or not at all. The server is a socket and a script."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from megatron_fipo.rollout.distributed_update import join_update_group
from megatron_fipo.rollout.engine import EngineAddress, EngineError
from megatron_fipo.rollout.event_loop import run
from megatron_fipo.rollout.http_call import Call, CallFailed, ConnectionBroke, call
from megatron_fipo.rollout.sglang_engine import connect_engine

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def address(port: int, request_timeout_s: float = 5.0) -> EngineAddress:
    return EngineAddress(
        name="e7",
        url=f"http://127.0.0.1:{port}",
        api_key="key",
        tp_size=1,
        vocab_size=100,
        seeded=True,
        prefix_cache=False,
        update_backend=None,
        start_timeout_s=2.0,
        request_timeout_s=request_timeout_s,
    )


def ask(
    script: Script, *, timeout_s: float = 5.0, answer: Any = "json", check: Callable[[], None] | None = None
) -> Any:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await script(reader, writer)
        except ConnectionError:
            pass  # the client had enough
        finally:
            writer.close()

    async def main() -> Any:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        try:
            port = server.sockets[0].getsockname()[1]
            return await call(address(port), Call("/x?y=1", {}, timeout_s, answer), check or (lambda: None))
        finally:
            server.close()

    return asyncio.run(main())


def reply(body: bytes, *, status: str = "200 OK", length: int | None = None, kind: str = "application/json") -> Script:
    size = len(body) if length is None else length

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()

    return script


def test_an_answer_is_its_json() -> None:
    assert ask(reply(b'[{"a": 1}]')) == [{"a": 1}]
    assert ask(reply(b"null")) is None
    assert ask(reply(b"Cache flushed."), answer="text") == "Cache flushed."
    for body in (b'{"success": true, "message": ""}', b'{"message": "paused", "status": "ok"}'):
        assert ask(reply(body), answer="done") == json.loads(body)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (reply(b'[{"a": 1}', length=9), "answered /x with no JSON"),
        (reply(b'{"a": [1, 2'), "answered /x with no JSON"),
        (reply(b""), "answered /x with no JSON"),
        (reply(b"<html>a proxy's page</html>", kind="text/html"), "no JSON .*<html>a proxy's page"),
        (reply(b"[" * 200_000), "answered /x with no JSON"),
        (reply(b"\xff\xfe\x00"), "answered /x with no JSON"),
        (reply(b"out of memory", status="500 Internal Server Error"), "with status 500: out of memory"),
        (reply(b"", status="302 Found\r\nLocation: http://127.0.0.1:1/"), "with status 302"),
        (reply(b'{"success": false, "message": "no session"}'), "refused /x: .*no session"),
        (reply(b'{"error": {"message": "bad"}}'), "refused /x: .*bad"),
    ],
)
def test_a_wrong_answer_is_told_by_what_it_is(script: Script, message: str) -> None:
    with pytest.raises(CallFailed, match=message):
        ask(script)


@pytest.mark.parametrize("body", [b"null", b"{}", b"[]", b"17", b'{"success": "true"}', b'{"status": "busy"}'])
def test_what_does_not_say_that_something_was_done_is_a_failure(body: bytes) -> None:
    with pytest.raises(CallFailed, match="did not say that it did /x"):
        ask(reply(body), answer="done")


def test_an_engine_that_did_not_flush_its_cache_is_asked_nothing() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        paths.append((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode())
        await reply(b"<html>a proxy's page</html>")(reader, writer)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        try:
            await connect_engine(address(server.sockets[0].getsockname()[1])).ascore([np.asarray([1, 2])])
        finally:
            server.close()

    paths: list[str] = []
    with pytest.raises(EngineError, match="did not say that it flushed its cache, but"):
        asyncio.run(main())
    assert paths == ["/flush_cache?timeout=30"]


def test_an_answer_cut_short_is_a_broken_connection() -> None:
    with pytest.raises(ConnectionBroke, match="broke the connection during /x"):
        ask(reply(b'[{"a": 1}]', length=5000))


async def _close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def _no_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n\r\n")
    await writer.drain()


async def _bad_chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n[]\r\n0\r\n\r\n")
    await writer.drain()


@pytest.mark.parametrize("script", [_close, _no_http, _bad_chunks])
def test_no_answer_is_a_broken_connection(script: Script) -> None:
    with pytest.raises(ConnectionBroke, match="broke the connection during /x"):
        ask(script)


async def _hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def _drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("script", [_hang, _drip])
def test_an_answer_that_takes_too_long_is_given_up_however_it_drips(script: Script) -> None:
    began = time.monotonic()
    with pytest.raises(CallFailed, match=r"gave no answer to /x within 0.6 s"):
        ask(script, timeout_s=0.6)
    assert 0.5 < time.monotonic() - began < 2.5


def test_a_dead_process_ends_the_wait() -> None:
    def check() -> None:
        raise EngineError("engine e7 ended with signal 9")

    began = time.monotonic()
    with pytest.raises(EngineError, match="ended with signal 9"):
        ask(_hang, timeout_s=30, check=check)
    assert time.monotonic() - began < 2


def test_an_engine_that_fails_while_it_joins_the_update_group_is_not_waited_for() -> None:
    async def ask(what: Call) -> Any:
        assert what.payload is not None
        assert what.payload["master_address"] == "127.0.0.1"
        raise EngineError("engine e7 ended with signal 9")

    began = time.monotonic()
    with pytest.raises(EngineError, match="signal 9"):
        asyncio.run(join_update_group(ask, backend="gloo", tp_size=1, host="127.0.0.1", timeout_s=60))
    assert time.monotonic() - began < 5


def test_an_engine_elsewhere_that_is_gone_is_an_engine_error_with_its_name() -> None:
    async def free_port() -> int:
        server = await asyncio.start_server(_hang, "127.0.0.1", 0)
        port = int(server.sockets[0].getsockname()[1])
        server.close()
        return port

    engine = connect_engine(address(asyncio.run(free_port())))
    with pytest.raises(EngineError, match="engine e7 broke the connection during /flush_cache"):
        asyncio.run(engine.ascore([np.asarray([1, 2])]))
    with pytest.raises(EngineError, match="engine e7 is not healthy: it broke the connection during /server_info"):
        run(engine.acheck_health(1))
    with pytest.raises(EngineError, match="engine e7 did not start within 2 s"):
        engine.wait_ready()
    with pytest.raises(EngineError, match="engine e7 belongs to another process"):
        engine.restart()
    engine.shutdown()
    with pytest.raises(EngineError, match="engine e7 has been shut down"):
        engine.check_alive()
