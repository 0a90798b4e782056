"""Two real engines on a tiny model, each behind a proxy that can be told to fail; started once for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from e2e.conftest import save_tiny_chat_model
from engines.bench import Bench, is_listening
from left_behind import nothing_left_behind

from megatron_fipo.weights.bucket import make_buckets


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> None:
    """The engines outlive a test here. `bench` looks for what they left once they have ended."""


@pytest.fixture(scope="package")
def keeper_of_shared_memory() -> None:
    """torch's own, which the first bucket starts: it is this process's, and stays."""
    next(make_buckets([("any", torch.ones(1))], 1 << 10))


@pytest.fixture(scope="package")
def bench(tmp_path_factory: pytest.TempPathFactory, keeper_of_shared_memory: None) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("engines")
    with nothing_left_behind("engines"):
        bench = Bench(save_tiny_chat_model(directory / "model"), directory)
        try:
            bench.start()
            yield bench
        finally:
            bench.close()
    assert not [port for port in bench.ports if is_listening(port)]
