"""Real engines behind fault proxies, and pools of clients to them: what the tests of engine faults stand on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from engines.fault_proxy import FaultProxy
from safetensors.torch import load_file

from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.rollout.server_process import start_engine
from megatron_fipo.rollout.sglang_engine import SGLangEngine, connect_engine
from megatron_fipo.types import Completion, GenerateRequest, SamplingSettings
from megatron_fipo.weights.bucket import make_buckets

NUM_ENGINES = 2
HEALTH_S = 3.0  # more than a busy machine makes an engine wait
QUICK_HEALTH_S = 0.7  # where an engine hangs, and the others of a quiet machine answer in less
MOST_WAITING = 8.0
TIMEOUT_S = 60.0
BUCKET_BYTES = 16 << 10

REQUESTS = [
    GenerateRequest(
        uid=f"{prompt}/{sample}",
        prompt_ids=np.arange(20 + prompt, 26 + 3 * prompt, dtype=np.int64),
        sampling=SamplingSettings(max_response_len=10 if prompt % 2 else 6),
        seed=100 * prompt + sample,
    )
    for prompt in range(6)
    for sample in range(2)
]
LONG_REQUESTS = [dataclasses.replace(item, sampling=SamplingSettings(max_response_len=60)) for item in REQUESTS]
SEQUENCES = [np.arange(30 + index, 38 + 2 * index, dtype=np.int64) for index in range(7)]


class Bench:
    """The engines, the proxies before them, and what they answer when nothing is wrong."""

    def __init__(self, model_dir: Path, directory: Path) -> None:
        self.weights = list(load_file(model_dir / "model.safetensors").items())
        self.engines = [start(model_dir, directory, f"real-{index}") for index in range(NUM_ENGINES)]
        self.proxies: list[FaultProxy] = []
        self.version = 0
        self.ports: list[int] = []
        self.completions: list[Completion] = []
        self.long_completions: list[Completion] = []
        self.long_s = 0.0  # how long these took
        self.scores: list[np.ndarray] = []
        self.generate_paths: list[str] = []
        self.update_paths: list[str] = []

    def start(self) -> None:
        for engine in self.engines:
            engine.wait_ready()
            self.proxies.append(FaultProxy(engine.address.url, engine.address.api_key))
        self._note_ports()
        pool, _ = self.fresh_pool()
        self.completions = pool.generate(REQUESTS)
        self.generate_paths = list(self.proxies[0].paths)
        self.scores = pool.score(SEQUENCES)
        started = time.monotonic()
        self.long_completions = pool.generate(LONG_REQUESTS)
        self.long_s = time.monotonic() - started
        for proxy in self.proxies:
            proxy.heal()
        update(pool, self.next_version(), self.weights)
        self.update_paths = list(self.proxies[0].paths)
        pool.shutdown()

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.close()
        for engine in self.engines:
            engine.shutdown()

    def next_version(self) -> int:
        self.version += 1
        return self.version

    def fresh_pool(self, **settings: Any) -> tuple[EnginePool, list[str]]:
        """A pool of new clients whose engines have just been given the weights under a new version, and what it says.
        No fault is in force."""
        for proxy in self.proxies:
            proxy.heal()
        said: list[str] = []
        timeout_s = settings.pop("request_timeout_s", TIMEOUT_S)
        clients = [
            ProxiedEngine(f"e{index}", lambda index=index, timeout_s=timeout_s: self.client(index, timeout_s))
            for index in range(NUM_ENGINES)
        ]
        pool = EnginePool(clients, **{"health_check_interval_s": patience(HEALTH_S), "say": said.append, **settings})
        update(pool, self.next_version(), self.weights)
        for proxy in self.proxies:
            proxy.paths.clear()
        return pool, said

    def client(self, index: int, timeout_s: float) -> SGLangEngine:
        address = dataclasses.replace(
            self.engines[index].address, name=f"e{index}", url=self.proxies[index].url, request_timeout_s=timeout_s
        )
        return connect_engine(address)

    def repair(self) -> None:
        """Close the updates that were broken off, so that the next one may be opened. What a real engine cannot do by
        itself: it is started again."""
        for engine, proxy in zip(self.engines, self.proxies, strict=True):
            proxy.heal()
            for path in ("/end_weight_update", "/continue_generation"):
                ask = urllib.request.Request(
                    engine.address.url + path,
                    data=b"{}",
                    headers={"Authorization": f"Bearer {engine.address.api_key}", "Content-Type": "application/json"},
                )
                with contextlib.suppress(urllib.error.HTTPError):  # none was open
                    urllib.request.urlopen(ask, timeout=TIMEOUT_S).close()

    def follow(self) -> None:
        """Point the proxies to where the engines are now."""
        for engine, proxy in zip(self.engines, self.proxies, strict=True):
            proxy.upstream = engine.address.url
            proxy.key = engine.address.api_key
        self._note_ports()

    def restart_unnoticed(self, index: int) -> None:
        """As another's hand might: clients see the same address and key."""
        engine = self.engines[index]
        engine.restart()
        engine.wait_ready()
        self.follow()

    def _note_ports(self) -> None:
        self.ports += [port for engine in self.engines if (port := urlsplit(engine.address.url).port) is not None]


def patience(seconds: float) -> float:
    """So long on a quiet machine, on a busy one the longer the more programs wait for each core."""
    waiting = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return seconds * min(max(1.0, waiting), MOST_WAITING)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class ProxiedEngine:
    """An Engine over a client that `connect` makes; started again means connected anew."""

    def __init__(self, name: str, connect: Callable[[], SGLangEngine]) -> None:
        self.name = name
        self._connect = connect
        self.client = connect()
        self.ended = 0

    @property
    def weight_version(self) -> int:
        return self.client.weight_version

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def restart(self) -> None:
        self.client = self._connect()
        self.client.weight_version = -1

    def shutdown(self) -> None:
        self.ended += 1
        self.client.shutdown()


def start(model_dir: Path, directory: Path, name: str) -> SGLangEngine:
    return start_engine(
        str(model_dir),
        name=name,
        dtype="float32",
        tp_size=1,
        context_length=128,
        random_seed=0,
        log_path=str(directory / f"{name}.log"),
        start_timeout_s=150,
        request_timeout_s=TIMEOUT_S,
        server_args={"max_total_tokens": 4096},
        use_cpu=True,
    )


def update(pool: EnginePool, version: int, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
    pool.begin_weight_update()
    for bucket in make_buckets(weights, BUCKET_BYTES):
        pool.push_bucket(bucket)
    pool.end_weight_update(version)
