"""A real SGLang engine on tiny random models: it serves exactly the weights it was sent, repeats itself bit for bit,
fails loudly and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from processes import TESTS, run_ranks
from tiny_engines import (
    EOS,
    PROMPTS,
    bits,
    greedy_matches,
    left_behind,
    listening_addresses,
    logprobs_under,
    own_segments,
    push,
    requests_for,
    start,
    tiny_experts,
    tiny_llama,
    tiny_qwen2,
    weights_of,
)

from megatron_fipo.rollout.engine import NO_VERSION, EngineError
from megatron_fipo.rollout.event_loop import run
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.rollout.process_group import group_members
from megatron_fipo.rollout.sglang_engine import SGLangEngine
from megatron_fipo.types import GenerateRequest
from megatron_fipo.weights.bucket import make_buckets


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SGLangEngine, SGLangEngine]]:
    """A one-rank engine on a Llama and a two-rank engine on a Qwen2, started together."""
    one_rank = start(tiny_llama(0), tmp_path_factory.mktemp("llama"))
    two_ranks = start(tiny_qwen2(0), tmp_path_factory.mktemp("qwen2"), tp_size=2)
    try:
        one_rank.wait_ready()
        two_ranks.wait_ready()
        yield one_rank, two_ranks
    finally:
        one_rank.shutdown()
        two_ranks.shutdown()


@pytest.mark.parametrize(("index", "build"), [(0, tiny_llama), (1, tiny_qwen2)], ids=["llama-tp1", "qwen2-tp2"])
def test_engine_serves_exactly_the_weights_it_was_sent(engines, index, build) -> None:
    engine = engines[index]
    old, new = build(100 + engine.weight_version), build(200 + engine.weight_version)
    push(engine, weights_of(old), engine.weight_version + 1)
    assert greedy_matches(engine, old)
    push(engine, weights_of(new), engine.weight_version + 1)
    assert greedy_matches(engine, new)
    assert not greedy_matches(engine, old)


def test_sampled_logprobs_are_the_models_and_stop_includes_the_end_of_turn(engines) -> None:
    engine, model = engines[0], tiny_llama(3)
    push(engine, weights_of(model), engine.weight_version + 1)
    requests = requests_for(PROMPTS, num_samples=16, length=40, temperature=1.0)
    completions = engine.generate(requests)
    assert [item.uid for item in completions] == [item.uid for item in requests]
    for request, completion in zip(requests, completions, strict=True):
        response = completion.token_ids.tolist()
        expected = logprobs_under(model, request.prompt_ids.tolist(), response)
        assert np.abs(completion.logprobs - expected).max() < 2e-5
        assert completion.weight_version == engine.weight_version
        assert EOS not in response[:-1]
        assert completion.finish_reason == ("stop" if response[-1] == EOS else "length")
        assert completion.finish_reason == "stop" or len(response) == 40
    assert {item.finish_reason for item in completions} == {"stop", "length"}
    assert len({tuple(item.token_ids.tolist()) for item in completions}) > 48


def test_the_same_requests_give_the_same_bits(engines) -> None:
    for engine in engines:
        requests = requests_for(PROMPTS, num_samples=8, length=12, temperature=1.0)
        first = bits(engine.generate(requests))
        engine.generate(requests_for([[5, 6, 7]], num_samples=3, length=5, temperature=1.0))
        assert bits(engine.generate(requests)) == first
        other_seeds = [GenerateRequest(r.uid, r.prompt_ids, r.sampling, r.seed + 500) for r in requests]
        assert bits(engine.generate(other_seeds)) != first


def test_score_gives_the_logprobs_of_given_tokens(engines) -> None:
    engine, model = engines[0], tiny_llama(4)
    push(engine, weights_of(model), engine.weight_version + 1)
    sequences = [np.asarray(prompt, dtype=np.int64) for prompt in PROMPTS]
    for ids, score in zip(sequences, engine.score(sequences), strict=True):
        expected = logprobs_under(model, ids.tolist()[:1], ids.tolist()[1:])
        np.testing.assert_allclose(score[:-1], expected, atol=2e-5)
        assert score[-1] == 0


def test_a_weight_that_was_not_sent_shows(engines) -> None:
    engine, model = engines[0], tiny_llama(5)
    push(engine, weights_of(model), engine.weight_version + 1)
    changed = tiny_llama(6)
    push(engine, weights_of(changed)[::2], engine.weight_version + 1)
    assert not greedy_matches(engine, changed)
    push(engine, weights_of(changed)[1::2], engine.weight_version + 1)
    assert greedy_matches(engine, changed)


def test_an_answer_of_another_weight_version_is_an_error(engines) -> None:
    engine = engines[0]
    served = engine.weight_version
    engine.weight_version = served + 1  # as if an update had been skipped
    try:
        with pytest.raises(EngineError, match=f"weight version {served}, not {served + 1}"):
            engine.generate(requests_for(PROMPTS[:1], num_samples=1, length=2, temperature=1.0))
    finally:
        engine.weight_version = served


def test_a_pool_serves_one_version_from_all_engines(engines) -> None:
    model = tiny_llama(8)
    pool = EnginePool(engines[:1])
    pool.begin_weight_update()
    for bucket in make_buckets(weights_of(model), bucket_bytes=1 << 20):
        pool.push_bucket(bucket)
    pool.end_weight_update(77)
    assert greedy_matches(engines[0], model)
    completions = pool.generate(requests_for(PROMPTS, num_samples=2, length=3, temperature=1.0))
    assert {item.weight_version for item in completions} == {77}


def test_every_socket_of_an_engine_is_this_machines_alone(engines) -> None:
    for engine in engines:
        addresses, paths = listening_addresses(engine)
        assert addresses == {"127.0.0.1"}
        assert paths
        assert {path.parent for path in paths} == {Path(engine.process.scratch_dir)}
        assert Path(engine.process.scratch_dir).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("index", "build"), [(0, tiny_llama), (1, tiny_qwen2)], ids=["llama-tp1", "qwen2-tp2"])
def test_weights_by_broadcast_are_served_and_leave_the_trainers_groups_alone(engines, index, build) -> None:
    engine, model, other = engines[index], build(31), build(32)
    shared_memory = engine.address
    engine.address = dataclasses.replace(shared_memory, update_backend="gloo")
    ours = psutil.Process()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = {connection.laddr for connection in ours.net_connections() if connection.status == "LISTEN"}
        default = dist.group.WORLD
        push(engine, weights_of(other), engine.weight_version + 1)
        push(engine, weights_of(model), engine.weight_version + 1)
        assert greedy_matches(engine, model)
        assert dist.group.WORLD is default
        assert dist.get_world_size(dist.new_group([0])) == 1
        value = torch.ones(1)
        dist.all_reduce(value)
        assert value == 1
        after = {connection.laddr for connection in ours.net_connections() if connection.status == "LISTEN"}
        assert after > before
        assert {place.ip for place in after - before} == {"127.0.0.1"}
        assert listening_addresses(engine)[0] == {"127.0.0.1"}
        push(engine, weights_of(other)[::2], engine.weight_version + 1)
        assert not greedy_matches(engine, model)
    finally:
        dist.destroy_process_group()
        engine.address = shared_memory
    push(engine, weights_of(model), engine.weight_version + 1)
    assert greedy_matches(engine, model)


def test_an_engine_serves_nobody_between_two_versions(engines) -> None:
    engine, model = engines[0], tiny_llama(9)
    requests = requests_for(PROMPTS[:1], num_samples=1, length=2, temperature=1.0)
    version = engine.weight_version + 1
    engine.begin_weight_update()
    assert engine.weight_version == NO_VERSION
    for bucket in make_buckets(weights_of(model), bucket_bytes=1 << 20):
        with pytest.raises(EngineError, match="engine0 cannot generate: it was given no whole set of weights"):
            engine.generate(requests)
        engine.push_bucket(bucket)
    with pytest.raises(EngineError, match="engine0 cannot score"):
        engine.score([requests[0].prompt_ids])
    with pytest.raises(EngineError, match="its last weight update broke off, it must be started again"):
        engine.begin_weight_update()
    engine.end_weight_update(version)
    assert engine.weight_version == version
    assert greedy_matches(engine, model)


def test_checksums_follow_the_weights_on_every_rank(engines) -> None:
    for engine, build, tp_size in ((engines[0], tiny_llama, 1), (engines[1], tiny_qwen2, 2)):
        seen = []
        for seed in (51, 52, 51):
            push(engine, weights_of(build(seed)), engine.weight_version + 1)
            seen.append(engine.weight_checksums())
        assert len(seen[0]) == tp_size
        assert "model.layers.0.mlp.gate_up_proj.weight" in seen[0][0]
        assert seen[0] == seen[2]
        changed = [name for name in seen[0][0] if seen[0][0][name] != seen[1][0][name]]
        assert [name for name in seen[0][0] if name not in changed and "norm" not in name and "bias" not in name] == []


def test_memory_is_released_and_resumed_by_tag(engines) -> None:
    """On a CPU nothing is freed: what is left to see are the calls, their order and what the engine refuses."""
    for engine, build in ((engines[0], tiny_llama), (engines[1], tiny_qwen2)):
        requests = requests_for(PROMPTS[:1], num_samples=1, length=2, temperature=1.0)
        engine.generate(requests)
        engine.release_memory(["kv_cache"])
        with pytest.raises(EngineError, match=r"cannot generate: its memory is released \(kv_cache\)"):
            engine.generate(requests)
        with pytest.raises(EngineError, match="told to release kv_cache twice"):
            engine.release_memory(["weights", "kv_cache"])
        with pytest.raises(EngineError, match="told to resume weights, which it has not released"):
            engine.resume_memory(["weights"])
        version = engine.weight_version
        engine.release_memory(["weights"])
        assert engine.weight_version == NO_VERSION
        with pytest.raises(EngineError, match="the memory of its weights is released"):
            engine.begin_weight_update()
        engine.resume_memory(["weights"])
        push(engine, weights_of(build(61)), version + 1)
        engine.resume_memory(["kv_cache"])
        assert greedy_matches(engine, build(61))


@pytest.mark.parametrize("index", [0, 1], ids=["tp1", "tp2"])
def test_health_checks_are_answered_while_generating_and_change_no_bit(engines, index) -> None:
    engine = engines[index]
    requests = requests_for(PROMPTS, num_samples=8, length=60, temperature=1.0)
    expected = bits(engine.generate(requests))
    found: list[object] = []
    busy = threading.Thread(target=lambda: found.extend(bits(engine.generate(requests))))
    busy.start()
    checks = 0
    while busy.is_alive():
        run(engine.acheck_health(30))
        checks += 1
    busy.join()
    assert found == expected
    assert checks > 1


def test_no_shared_memory_is_left_after_updates(engines) -> None:
    push(engines[0], weights_of(tiny_llama(1)), engines[0].weight_version + 1)
    deadline = time.monotonic() + 5  # torch's manager removes a file shortly after its last user let go
    while own_segments() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert own_segments() == []


def test_the_api_key_is_neither_in_the_arguments_nor_in_the_log(engines) -> None:
    key = engines[0].address.api_key
    commands = [" ".join(process.cmdline()) for process in group_members(engines[0].process_id)]
    assert commands
    assert not [command for command in commands if key in command]
    log = Path(engines[0].process.log_path)
    assert key not in log.read_text()
    assert log.stat().st_mode & 0o077 == 0
    answer = subprocess.run(
        [sys.executable, "-c", f"import urllib.request as r; r.urlopen('{engines[0].address.url}/model_info')"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "401" in answer.stderr


def test_an_idle_engine_uses_no_cpu(engines) -> None:
    processes = [psutil.Process(engines[0].process_id), *group_members(engines[0].process_id)]
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    time.sleep(3)
    assert sum(sum(process.cpu_times()[:2]) for process in processes) - before < 0.6


def test_an_engine_dies_with_its_trainer_and_repeats_another_engines_bits(engines, tmp_path) -> None:
    """The trainer is killed without a chance to clean up. Before that, a second engine with the same weights and
    requests must have given the bits of the first."""
    model = tiny_llama(11)
    push(engines[0], weights_of(model), engines[0].weight_version + 1)
    expected = bits(engines[0].generate(requests_for(PROMPTS, num_samples=8, length=12, temperature=1.0)))
    shm_before = set(os.listdir("/dev/shm"))
    trainer = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ, RANK="0", PYTHONPATH=str(TESTS)),
    )
    assert trainer.stdout is not None
    line = trainer.stdout.readline()
    assert line, "the trainer ended early"
    report = json.loads(line)
    assert report["bits"] == [[uid, ids, logprobs.hex()] for uid, ids, logprobs in expected]
    group = report["group"]
    assert group_members(group)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 15
    while group_members(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_members(group)
    assert not Path(report["scratch"]).exists()
    assert left_behind(shm_before) == []


@pytest.fixture(scope="module")
def experts_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    """A two-rank engine on a mixture of experts, started on other weights than the trainer's."""
    engine = start(tiny_experts(0), tmp_path_factory.mktemp("experts"), tp_size=2)
    try:
        engine.wait_ready()
        yield engine
    finally:
        engine.shutdown()


def test_an_engine_serves_the_experts_that_two_ranks_train(experts_engine, tmp_path) -> None:
    engine, model = experts_engine, tiny_experts(1)
    assert greedy_matches(engine, tiny_experts(0))
    model.save_pretrained(tmp_path / "model")
    kwargs = {"model_dir": str(tmp_path / "model"), "prompts": PROMPTS}
    trained = run_ranks(tmp_path, 2, export_and_score, kwargs)[0]
    push(engine, list(trained["weights"].items()), engine.weight_version + 1)
    assert greedy_matches(engine, model)
    scores = engine.score([np.asarray(prompt, dtype=np.int64) for prompt in PROMPTS])
    for score, logprobs in zip(scores, trained["logprobs"], strict=True):
        np.testing.assert_allclose(score, logprobs.numpy(), atol=2e-5)


def export_and_score(model_dir: str, prompts: list[list[int]]) -> dict[str, object]:
    """On a rank: the trainer's weights as it sends them, and its log-probs of every next token."""
    from actor_on_ranks import make_actor, make_groups

    from megatron_fipo.types import TrainSequence

    actor = make_actor(model_dir, *make_groups(ep=2))
    sequences = [
        TrainSequence(
            uid=str(index),
            token_ids=np.asarray(prompt, dtype=np.int64),
            loss_mask=np.arange(len(prompt)) < len(prompt) - 1,
            advantages=np.zeros(len(prompt), dtype=np.float32),
            rollout_logprobs=np.zeros(len(prompt), dtype=np.float32),
            token_versions=np.zeros(len(prompt), dtype=np.int64),
        )
        for index, prompt in enumerate(prompts)
    ]
    weights = {name: value.clone() for name, value in actor.export_weights()}
    return {"weights": weights, "logprobs": actor.old_logprobs([sequences])[0]}


def test_a_failing_start_quotes_the_engines_exception(tmp_path) -> None:
    shm_before = set(os.listdir("/dev/shm"))
    engine = start(tiny_llama(0), tmp_path, schedule_policy="no-such-policy")
    with pytest.raises(EngineError, match=r"last exception in its log: .*no-such-policy"):
        engine.wait_ready()
    engine.shutdown()
    assert not group_members(engine.process_id)
    assert left_behind(shm_before) == []


def _trainer(directory: Path) -> None:
    engine = start(tiny_llama(11), directory)
    engine.wait_ready()
    completions = engine.generate(requests_for(PROMPTS, num_samples=8, length=12, temperature=1.0))
    report = {
        "group": engine.process_id,
        "scratch": engine.process.scratch_dir,
        "bits": [[uid, ids, logprobs.hex()] for uid, ids, logprobs in bits(completions)],
    }
    print(json.dumps(report), flush=True)
    time.sleep(300)


if __name__ == "__main__":
    _trainer(Path(sys.argv[1]))
