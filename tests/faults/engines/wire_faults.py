"""How an answer goes wrong on the wire: each fault takes a moment in [0, 1), which says where in the answer."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable

from engines.fault_proxy import Act, Exchange

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


def cut(*, honest: bool) -> Callable[[float], Act]:
    """The first part of the body; `honest`: with its length in the header, else the connection ends early."""

    def at(moment: float) -> Act:
        async def act(exchange: Exchange) -> None:
            head, body = await exchange.forward()
            part = body[: int(moment * len(body))]
            await (exchange.send_body(head, part) if honest else exchange.send(head, part))

        return act

    return at


def understated(moment: float) -> Act:
    """The whole body, but fewer bytes in the header."""

    async def act(exchange: Exchange) -> None:
        head, body = await exchange.forward()
        lines = [line for line in head.split(b"\r\n") if line and not line.lower().startswith(b"content-length")]
        length = b"content-length: %d" % int(moment * len(body))
        await exchange.send(b"\r\n".join([*lines, length, b"", b""]), body)

    return act


def overstated(moment: float) -> Act:
    """The whole body, but more bytes in the header, for which the client waits."""

    async def act(exchange: Exchange) -> None:
        head, body = await exchange.forward()
        lines = [line for line in head.split(b"\r\n") if line and not line.lower().startswith(b"content-length")]
        length = b"content-length: %d" % (len(body) + 1 + int(moment * 1000))
        await exchange.send(b"\r\n".join([*lines, length, b"", b""]), body)
        await exchange.hang()

    return act


def reset_within(moment: float) -> Act:
    async def act(exchange: Exchange) -> None:
        head, body = await exchange.forward()
        await exchange.send(head, body[: int(moment * len(body))])
        exchange.reset()

    return act


def reset_at_once(moment: float) -> Act:
    async def act(exchange: Exchange) -> None:
        exchange.reset()

    return act


def close_at_once(moment: float) -> Act:
    async def act(exchange: Exchange) -> None:
        return

    return act


def hang_at_once(moment: float) -> Act:
    async def act(exchange: Exchange) -> None:
        await exchange.hang()

    return act


def hang_within(moment: float) -> Act:
    async def act(exchange: Exchange) -> None:
        head, body = await exchange.forward()
        await exchange.send(head, body[: int(moment * len(body))])
        await exchange.hang()

    return act


def drip(part: Callable[[bytes, bytes], tuple[int, int]]) -> Callable[[float], Act]:
    """A byte at a time from the moment on; the rest would take hours. `part`: (head, body) -> first and last byte of
    what the moment lies in."""

    def at(moment: float) -> Act:
        async def act(exchange: Exchange) -> None:
            head, body = await exchange.forward()
            first, last = part(head, body)
            start = first + int(moment * (last - first))
            answer = head + body
            await exchange.send(b"", answer[:start])
            for byte in answer[start:]:
                await exchange.send(b"", bytes([byte]))
                await asyncio.sleep(0.2)

        return act

    return at


async def _send_without_end(exchange: Exchange, first: bytes, then: bytes) -> None:
    await exchange.send(first, b"")
    while True:
        await exchange.send(b"", then)
        await asyncio.sleep(0.001)


def endless(first: bytes, then: bytes) -> Callable[[float], Act]:
    def at(moment: float) -> Act:
        async def act(exchange: Exchange) -> None:
            await _send_without_end(exchange, first, then)

        return act

    return at


def whole(line: str, body: bytes, headers: bytes = b"") -> Callable[[float], Act]:
    """Another answer altogether."""

    def at(moment: float) -> Act:
        async def act(exchange: Exchange) -> None:
            await exchange.send_body(f"HTTP/1.1 {line}\r\n".encode() + headers + b"\r\n", body)

        return act

    return at


def bytes_only(data: bytes) -> Callable[[float], Act]:
    def at(moment: float) -> Act:
        async def act(exchange: Exchange) -> None:
            await exchange.send(b"", data)

        return act

    return at


def false_gzip(moment: float) -> Act:
    """Said to be gzip, and broken."""

    async def act(exchange: Exchange) -> None:
        _, body = await exchange.forward()
        packed = bytearray(gzip.compress(body))
        packed[12 + int(moment * (len(packed) - 12))] ^= 0xFF
        await exchange.send_body(HEAD + b"content-encoding: gzip\r\n\r\n", bytes(packed))

    return act


def gzip_bomb(moment: float) -> Act:
    """64 MiB of blanks in 64 KiB, and no answer in them."""

    async def act(exchange: Exchange) -> None:
        await exchange.send_body(HEAD + b"content-encoding: gzip\r\n\r\n", gzip.compress(b" " * (64 << 20)))

    return act


def huge(moment: float) -> Act:
    async def act(exchange: Exchange) -> None:
        await exchange.send_body(HEAD + b"\r\n", b"[" + b" " * (64 << 20))

    return act
