"""What an engine's HTTP server lets in, before SGLang sees it: a small ASGI middleware.

SGLang unpickles what some of its paths are sent (weights as handles to shared memory, LoRA adapters). Those paths, and
all others that the run does not need, are open to this machine alone; the API key guards every path on top of that.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

REMOTE_PATHS = frozenset(
    {
        "/ready",
        "/health",
        "/server_info",
        "/generate",
        "/abort_request",
        "/flush_cache",
        "/pause_generation",
        "/continue_generation",
        "/begin_weight_update",
        "/end_weight_update",
        "/update_weight_version",
        "/weights_checker",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/init_weights_update_group",
        "/update_weights_from_distributed",
    }
)
"""Open to other machines that have the key. None of them unpickles anything."""

_METHODS = ("GET", "POST")
_CLOSED_PATHS = frozenset({"/health_generate"})  # generates for whoever asks, key or none


class RequestFilter:
    """Lets HTTP requests of this machine through, and those of other machines to REMOTE_PATHS.

    Closes what SGLang serves to anyone without asking for the key: websockets, and a health check that generates.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and _is_allowed(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            body = b'{"error":"closed"}'
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        else:
            await send({"type": "websocket.close", "code": 1008})


def is_local(client: str | None, server: str | None) -> bool:
    """Whether a connection from address `client` to address `server` stays on this machine: over loopback, or from the
    very address it arrives at (the kernel drops packets from outside that claim one of its own addresses)."""
    if client is None or server is None:
        return False
    try:
        client_address, server_address = _plain(client), _plain(server)
    except ValueError:
        return False
    return client_address.is_loopback or client_address == server_address


def _is_allowed(scope: Message) -> bool:
    if scope["path"] in _CLOSED_PATHS:
        return False
    client, server = scope.get("client"), scope.get("server")
    if is_local(client[0] if client else None, server[0] if server else None):
        return True
    return scope["path"] in REMOTE_PATHS and scope["method"] in _METHODS


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed
