"""A real engine that listens on a network: who gets in, what a hang and a death look like, and starting it again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tiny_engines import (
    PROMPTS,
    greedy_matches,
    left_behind,
    listening_addresses,
    push,
    requests_for,
    start,
    tiny_llama,
    weights_of,
)

from megatron_fipo.rollout.engine import NO_VERSION, EngineError
from megatron_fipo.rollout.event_loop import run
from megatron_fipo.rollout.process_group import group_members
from megatron_fipo.rollout.sglang_engine import SGLangEngine, connect_engine
from megatron_fipo.weights.bucket import make_buckets

ASK = """
import json, sys, urllib.error, urllib.request
for url, key, body in json.load(sys.stdin):
    headers = {"Content-Type": "application/json"} | ({"Authorization": "Bearer " + key} if key else {})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        print(urllib.request.urlopen(request, timeout=60).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""
HANDSHAKE = (
    "GET /v1/realtime HTTP/1.1\r\nHost: engine\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)


@dataclass(frozen=True)
class OtherMachine:
    """A network namespace with one wire to this machine."""

    our_address: str
    prefix: tuple[str, ...]  # runs a command over there

    def statuses(self, requests: list[tuple[str, str | None, object]]) -> list[int]:
        """HTTP statuses of (URL, API key, JSON body or None for a GET), asked from over there."""
        ran = subprocess.run(
            [*self.prefix, sys.executable, "-I", "-c", ASK],
            input=json.dumps(requests),
            capture_output=True,
            text=True,
            check=True,
        )
        return [int(line) for line in ran.stdout.split()]


@pytest.fixture(scope="module")
def other_machine() -> Iterator[OtherMachine]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("another machine is played by a network namespace, which takes root and iproute2")
    number = os.getpid() % 60000
    space, wire = f"fipo{number}", f"fw{number}"
    ours, theirs = (f"198.18.{number // 250}.{number % 250 // 4 * 4 + host}" for host in (1, 2))
    commands = [
        f"ip netns add {space}",
        f"ip link add {wire}a type veth peer name {wire}b netns {space}",
        f"ip addr add {ours}/30 dev {wire}a",
        f"ip link set {wire}a up",
        f"ip -n {space} addr add {theirs}/30 dev {wire}b",
        f"ip -n {space} link set {wire}b up",
    ]
    try:
        for command in commands:
            made = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"{command}: {made.stderr.strip()}")
        yield OtherMachine(ours, ("ip", "netns", "exec", space))
    finally:
        subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)  # takes the wire along


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[SGLangEngine]:
    """On the address that the other machine sees, where there is one."""
    try:
        host = request.getfixturevalue("other_machine").our_address
    except pytest.skip.Exception:
        host = "127.0.0.1"
    made = start(tiny_llama(0), tmp_path_factory.mktemp("llama"), host=host)
    try:
        made.wait_ready()
        yield made
    finally:
        made.shutdown()


def test_the_engine_listens_on_loopback_and_the_chosen_interface_only(engine, other_machine) -> None:
    addresses, _ = listening_addresses(engine)
    assert addresses == {"127.0.0.1", other_machine.our_address}
    (http,) = {
        connection.laddr.port
        for process in group_members(engine.process_id)
        for connection in process.net_connections()
        if connection.status == "LISTEN" and connection.laddr.ip == other_machine.our_address
    }
    assert engine.address.url == f"http://{other_machine.our_address}:{http}"


def test_another_machine_needs_the_key_and_may_not_send_what_is_unpickled(engine, other_machine) -> None:
    url, key = engine.address.url, engine.address.api_key
    tokens = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 1}}
    (bucket,) = make_buckets(weights_of(tiny_llama(1))[:1], 1 << 30)
    pickled = {"serialized_named_tensors": [bucket.handle()], "flush_cache": False}
    expected: list[tuple[str, str | None, object, int]] = [
        ("/ready", None, None, 200),
        ("/health", None, None, 200),
        ("/generate", key, tokens, 200),
        ("/server_info", key, None, 200),
        ("/weights_checker", key, {"action": "checksum"}, 200),
        ("/generate", None, tokens, 401),
        ("/generate", key[:-1], tokens, 401),
        ("/server_info", None, None, 401),
        ("/weights_checker", "", {"action": "checksum"}, 401),
        ("/update_weights_from_tensor", None, pickled, 401),
        ("/update_weights_from_tensor", key, pickled, 403),
        ("/update_weights_from_ipc", key, {"zmq_handles": {}}, 403),
        ("/load_lora_adapter_from_tensors", key, {}, 403),
        ("/update_weights_from_disk", key, {"model_path": "/"}, 403),
        ("/health_generate", None, None, 403),
        ("/model_info", key, None, 403),
        ("/openapi.json", key, None, 403),
        ("/no_such_path", key, None, 403),
    ]
    statuses = other_machine.statuses([(url + path, secret, body) for path, secret, body, _ in expected])
    assert statuses == [status for *_, status in expected]
    push(engine, weights_of(tiny_llama(2)), engine.weight_version + 1)  # from this machine, by the same path
    assert greedy_matches(engine, tiny_llama(2))


def test_no_websocket_is_opened(engine) -> None:
    """uvicorn serves them where the package websockets is installed; SGLang then asks for no key."""
    host, port = engine.address.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(HANDSHAKE.encode())
        assert connection.recv(100).split()[1] in (b"401", b"403")


def test_an_engine_can_be_driven_by_its_address_alone(engine) -> None:
    model = tiny_llama(3)
    driver = connect_engine(engine.address)
    driver.wait_ready()
    driver.begin_weight_update()
    for bucket in make_buckets(weights_of(model), 1 << 20):
        driver.push_bucket(bucket)
    driver.end_weight_update(40)
    assert greedy_matches(driver, model)
    assert driver.weight_checksums() == engine.weight_checksums()
    driver.shutdown()
    run(engine.acheck_health(10))
    with pytest.raises(EngineError, match="weight version 40, not"):
        engine.generate(requests_for(PROMPTS[:1], num_samples=1, length=2, temperature=1.0))
    push(engine, weights_of(model), 41)


def test_a_hung_scheduler_is_not_healthy(engine) -> None:
    scheduler = scheduler_of(engine)
    scheduler.suspend()
    began = time.monotonic()
    try:
        with pytest.raises(EngineError, match="engine0 is not healthy: it gave no answer to /server_info within 1 s"):
            run(engine.acheck_health(1))
        assert time.monotonic() - began < 4
        engine.check_alive()
    finally:
        scheduler.resume()
    run(engine.acheck_health(30))


def test_a_death_is_an_error_in_every_call_and_the_engine_starts_again_without_weights(engine) -> None:
    """Killed while it generates, then while it takes a bucket by broadcast. Nothing is left of it each time."""
    requests = requests_for(PROMPTS, num_samples=8, length=200, temperature=1.0)
    shm_before = set(os.listdir("/dev/shm"))
    for_ever = lambda: [engine.generate(requests) for _ in range(1000)]  # noqa: E731
    assert_ends(engine, for_ever, after_s=0.7)
    with pytest.raises(EngineError, match="engine0"):
        run(engine.acheck_health(5))
    first, old_members = engine.address, group_members(engine.process_id)
    scratch = Path(engine.process.scratch_dir)
    engine.restart()
    assert not any(member.is_running() for member in old_members)
    assert not scratch.exists()
    assert engine.address.url != first.url
    assert engine.address.api_key != first.api_key
    engine.wait_ready()
    assert engine.weight_version == NO_VERSION
    with pytest.raises(EngineError, match="cannot generate: it was given no whole set of weights"):
        engine.generate(requests)
    assert first.api_key not in Path(engine.process.log_path).read_text()
    model = tiny_llama(4)
    push(engine, weights_of(model), 7)
    assert greedy_matches(engine, model)

    engine.address = dataclasses.replace(engine.address, update_backend="gloo")
    (bucket,) = make_buckets(weights_of(model), 1 << 30)
    engine.begin_weight_update()
    scheduler_of(engine).suspend()
    assert_ends(engine, lambda: engine.push_bucket(bucket), after_s=0.5)
    assert engine.weight_version == NO_VERSION
    engine.shutdown()
    engine.shutdown()
    assert not group_members(engine.process_id)
    assert left_behind(shm_before) == []
    for call in (engine.check_alive, lambda: run(engine.acheck_health(5)), lambda: push(engine, [], 9)):
        with pytest.raises(EngineError):
            call()


def scheduler_of(engine: SGLangEngine) -> psutil.Process:
    return max(group_members(engine.process_id), key=lambda process: process.memory_info().rss)


def assert_ends(engine: SGLangEngine, call: Callable[[], object], *, after_s: float) -> None:
    """The call is an EngineError with the log's tail soon after the engine's scheduler is killed."""

    def kill() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            scheduler.send_signal(signal.SIGKILL)

    scheduler = scheduler_of(engine)
    timer = threading.Timer(after_s, kill)
    timer.start()
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"engine0 (ended|broke|was lost)(?s:.)*last lines of"):
        call()
    timer.join()
    assert time.monotonic() - began < 15
