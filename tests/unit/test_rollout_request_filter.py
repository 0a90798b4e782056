"""Who may ask an engine what."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from megatron_fipo.rollout.request_filter import REMOTE_PATHS, RequestFilter, is_local


def outcome(kind: str, path: str, client: str | None, server: str | None, method: str = "POST") -> object:
    """ "passed", the status of a refusal, or "closed"."""
    sent: list[dict[str, Any]] = []
    passed = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read of a refused request")

    scope = {
        "type": kind,
        "path": path,
        "method": method,
        "client": None if client is None else (client, 40000),
        "server": None if server is None else (server, 8000),
    }
    asyncio.run(RequestFilter(app)(scope, receive, send))
    if passed:
        assert not sent
        return "passed"
    return sent[0].get("status", "closed" if sent[0]["type"] == "websocket.close" else None)


@pytest.mark.parametrize(
    ("client", "server", "local"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.2", "127.0.0.1", True),
        ("::1", "::1", True),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", True),
        ("10.0.0.5", "10.0.0.5", True),
        ("::ffff:10.0.0.5", "10.0.0.5", True),
        ("10.0.0.6", "10.0.0.5", False),
        ("128.0.0.1", "127.0.0.1", False),
        ("", "127.0.0.1", False),
        ("localhost", "127.0.0.1", False),
        (None, "127.0.0.1", False),
        ("127.0.0.1", None, False),
    ],
)
def test_local_is_loopback_or_the_address_arrived_at(client: str | None, server: str | None, local: bool) -> None:
    assert is_local(client, server) is local


@pytest.mark.parametrize("path", ["/update_weights_from_tensor", "/load_lora_adapter_from_tensors", "/metrics"])
def test_a_path_that_the_run_does_not_need_from_afar_is_closed_to_other_machines(path: str) -> None:
    assert outcome("http", path, "127.0.0.1", "127.0.0.1") == "passed"
    assert outcome("http", path, "10.0.0.5", "10.0.0.5") == "passed"
    assert outcome("http", path, "10.0.0.6", "10.0.0.5") == 403
    assert outcome("http", path, None, "10.0.0.5") == 403


def test_the_health_check_that_generates_is_closed_to_all() -> None:
    assert outcome("http", "/health_generate", "127.0.0.1", "127.0.0.1", "GET") == 403
    assert outcome("http", "/health", "127.0.0.1", "127.0.0.1", "GET") == "passed"


def test_other_machines_may_generate_and_check() -> None:
    for path in REMOTE_PATHS:
        assert outcome("http", path, "10.0.0.6", "10.0.0.5") == "passed"
    assert outcome("http", "/generate", "10.0.0.6", "10.0.0.5", "OPTIONS") == 403
    assert outcome("http", "/generate/", "10.0.0.6", "10.0.0.5") == 403
    assert outcome("http", "//generate", "10.0.0.6", "10.0.0.5") == 403


def test_no_websocket_is_opened_for_anyone() -> None:
    assert outcome("websocket", "/v1/realtime", "127.0.0.1", "127.0.0.1") == "closed"
    assert outcome("websocket", "/generate", "10.0.0.6", "10.0.0.5") == "closed"
