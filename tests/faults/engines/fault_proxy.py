"""A proxy on loopback between an engine's client and the engine: forwards HTTP faithfully until told otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_OURS = (b"connection:", b"authorization:")
_LINGER_RESET = struct.pack("ii", 1, 0)  # close() then sends RST


@dataclass
class Exchange:
    """A request on its way, and the means to answer it, or not to."""

    proxy: FaultProxy
    head: bytes  # the request's first line and headers, up to and with the empty line
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def path(self) -> str:
        return self.head.split(b" ", 2)[1].decode().partition("?")[0]

    async def forward(self) -> tuple[bytes, bytes]:
        """Ask the engine; (first line and headers with the empty line, body). Given up when the client is."""
        answer = asyncio.create_task(_ask(self.proxy, self.head, self.body))
        gone = asyncio.create_task(self.reader.read(1))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ConnectionResetError("the client has gone")
            return answer.result()
        finally:
            answer.cancel()
            gone.cancel()

    async def send(self, head: bytes, body: bytes) -> None:
        self.writer.write(head + body)
        await self.writer.drain()

    async def send_body(self, head: bytes, body: bytes) -> None:
        """A whole answer: `head` with the content-length of this body."""
        lines = [line for line in head.split(b"\r\n") if line and not line.lower().startswith(b"content-length")]
        await self.send(b"\r\n".join([*lines, b"content-length: %d" % len(body), b"", b""]), body)

    async def hang(self) -> None:
        """Nothing more, until the client goes."""
        while await self.reader.read(1 << 16):
            pass

    def reset(self) -> None:
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        self.writer.transport.abort()


Act = Callable[[Exchange], Awaitable[None]]


def any_request(exchange: Exchange) -> bool:
    return True


@dataclass
class Fault:
    """`act` instead of forwarding, at the request number `index` (from 0) of those that match, and if it `lasts` at
    every request after it, matching or not."""

    act: Act
    matches: Callable[[Exchange], bool] = any_request
    index: int = 0
    lasts: bool = False
    refuses: bool = False  # the port is closed from then on
    injected: int = field(default=0, init=False)
    _seen: int = field(default=0, init=False)

    def is_due(self, exchange: Exchange) -> bool:
        if self.injected and self.lasts:
            return True
        if not self.matches(exchange):
            return False
        self._seen += 1
        return self._seen == self.index + 1


class FaultProxy:
    """One engine's. `url` stays the same; `upstream` and `key`, the engine's own, change when it is started again."""

    def __init__(self, upstream: str, key: str) -> None:
        self.upstream = upstream
        self.key = key
        self.paths: list[str] = []  # of all requests since `heal`
        self._fault: Fault | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: asyncio.Server | None = None
        self.port = 0
        self._call(self._listen())
        self.url = f"http://127.0.0.1:{self.port}"

    def inject(self, fault: Fault) -> Fault:
        self._fault = fault
        if fault.refuses and fault.index == 0 and fault.matches is any_request:
            fault.injected = 1
            self._call(self._stop_listening())
        return fault

    def heal(self) -> None:
        """Forward everything again."""
        self._fault = None
        self.paths.clear()
        self._call(self._listen())

    def close(self) -> None:
        self._call(self._stop_listening())
        self._call(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10.0)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 26)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request per connection."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            exchange = Exchange(self, head, await reader.readexactly(_content_length(head)), reader, writer)
            self.paths.append(exchange.path)
            fault = self._fault
            if fault is not None and fault.is_due(exchange):
                fault.injected += 1
                if fault.refuses:
                    await self._stop_listening()
                await fault.act(exchange)
            else:
                await exchange.send(*await exchange.forward())
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client or the engine has gone, and the other end is told so below
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _ask(proxy: FaultProxy, head: bytes, body: bytes) -> tuple[bytes, bytes]:
    address = urlsplit(proxy.upstream)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 26)
    try:
        own = (b"connection: close", b"authorization: Bearer " + proxy.key.encode())
        lines = [line for line in head.split(b"\r\n") if line and not line.lower().startswith(_OURS)]
        writer.write(b"\r\n".join([*lines, *own, b"", b""]) + body)
        await writer.drain()
        answer_head = await reader.readuntil(b"\r\n\r\n")
        assert b"transfer-encoding" not in answer_head.lower(), answer_head
        return answer_head, await reader.readexactly(_content_length(answer_head))
    finally:
        writer.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0
