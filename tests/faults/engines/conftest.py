"""Two real engines on a tiny model, each behind a proxy that can be told to fail; started once for all tests here."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from e2e.conftest import save_tiny_chat_model
from engines.bench import Bench
from left_behind import nothing_left_behind


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> None:
    """The engines outlive a test here. `bench` looks for what they left once they have ended."""


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("engines")
    with nothing_left_behind("engines"):
        bench = Bench(save_tiny_chat_model(directory / "model"), directory)
        try:
            bench.start()
            yield bench
        finally:
            bench.close()
    for port in bench.ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"something still listens on port {port}"
