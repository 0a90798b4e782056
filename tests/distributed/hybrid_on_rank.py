"""What the test of the hybrid engine runs on its rank: a real actor and a real engine take turns, and one dies."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_fipo.actor.actor import Actor, build_actor
from megatron_fipo.actor.setup import initialize_model_parallel
from megatron_fipo.config import FIPOSettings
from megatron_fipo.hybrid.turns import HybridEngine
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.patches.megatron_cpu import apply_patches
from megatron_fipo.rollout.server_process import start_engines
from megatron_fipo.run_config import EnginePlacement, EngineSettings
from megatron_fipo.types import Completion, GenerateRequest, SamplingSettings, TrainSequence
from megatron_fipo.weights.architecture import read_architecture
from megatron_fipo.weights.engine_layout import expected_checksums
from megatron_fipo.weights.hf_files import HFWeights

LENGTH = 12
PROMPTS = [np.arange(20, 20 + length) for length in (3, 9, 17, 6)]


class Side:
    """Actor, engines and hybrid engine, and what is asked of them in every version."""

    def __init__(self, actor: Actor, pool: Any, hybrid: HybridEngine) -> None:
        self.actor, self.pool, self.hybrid = actor, pool, hybrid

    def generate(self) -> list[Completion]:
        sampling = SamplingSettings(LENGTH, temperature=1.0)
        return self.hybrid.generate(
            [GenerateRequest(f"p/{i}", prompt, sampling, seed=100 + i) for i, prompt in enumerate(PROMPTS)]
        )

    def train(self, completions: list[Completion]) -> float:
        """One update on the completions, hence the largest difference between the engine's and the actor's log-probs
        of what the engine drew."""
        sequences = [as_sequence(i, completion) for i, completion in enumerate(completions)]
        self.hybrid.start_training()
        logprobs, _ = self.actor.old_logprobs([sequences])
        metrics = self.actor.update(sequences, logprobs, algorithm="fipo", settings=FIPOSettings())
        assert metrics is not None
        assert not metrics["skipped"]
        return max(
            float((ours - torch.from_numpy(sequence.rollout_logprobs)).abs().max())
            for ours, sequence in zip(logprobs, sequences, strict=True)
        )

    def engines_hold_the_actor(self) -> bool:
        """Whether every engine's own checksums are those of the actor's weights, exported anew."""
        with self.hybrid.actor_at_work():
            buckets = self.actor.export_buckets(1 << 20)
            wanted = expected_checksums(self.actor.arch, buckets, tp_size=1)
        held = self.pool.weight_checksums()
        return bool(held) and len(wanted[0]) > 10 and all(ranks == wanted for ranks in held.values())


def take_turns(model_dir: str, log_dir: str, placement: EnginePlacement) -> dict[str, Any]:
    """Three steps, with the engine killed in training before the last."""
    apply_patches()
    layout = ParallelLayout.for_world(dist.get_world_size(), dist.get_rank())
    settings = EngineSettings(placement=placement, start_timeout_s=120.0, request_timeout_s=60.0)
    found: dict[str, Any] = {"turns": [], "versions": [], "differences": [], "holds": []}
    with start_engines(
        model_dir,
        settings,
        num_engines=1,
        dtype="float32",
        longest=64,
        random_seed=0,
        log_dir=log_dir,
        use_cpu=True,
    ) as pool:
        actor = make_actor(model_dir, layout)
        side = Side(
            actor,
            pool,
            HybridEngine(
                actor,
                pool,
                bucket_bytes=10_000,
                placement=placement,
                offload_trainer=placement == "colocated",
            ),
        )
        pool.wait_ready()

        def note_turn() -> None:
            found["turns"].append([side.hybrid.state, side.hybrid.memory()[f"memory/{side.hybrid.state}/engines"]])

        sync(side, 0)
        note_turn()
        for version in (1, 2, 3):
            completions = side.generate()
            found["versions"].append([completion.weight_version for completion in completions])
            found["holds"].append(side.engines_hold_the_actor())
            again = side.generate()
            found["repeats"] = all(
                np.array_equal(one.token_ids, other.token_ids) and np.array_equal(one.logprobs, other.logprobs)
                for one, other in zip(completions, again, strict=True)
            )
            found["differences"].append(side.train(completions))
            note_turn()
            if version == 3:
                found["killed"] = kill(pool.engines[0].process_id)
            sync(side, version)
            note_turn()
        completions = side.generate()
        found["versions"].append([completion.weight_version for completion in completions])
        found["holds"].append(side.engines_hold_the_actor())
        found["differences"].append(side.train(completions))
        note_turn()
        found["memory"] = side.hybrid.memory()
        found["restarts"] = pool.num_restarts_in_all
    return found


def sync(side: Side, version: int) -> None:
    failure = side.hybrid.sync_weights(version)
    assert failure is None, failure


def kill(process_id: int) -> int:
    """End an engine as the kernel's out-of-memory killer would, without a word."""
    os.kill(process_id, signal.SIGKILL)
    time.sleep(0.5)
    return process_id


def make_actor(model_dir: str, layout: ParallelLayout) -> Actor:
    return build_actor(
        read_architecture(model_dir),
        HFWeights(model_dir),
        layout,
        initialize_model_parallel(layout, seed=1, timeout_minutes=5),
        params_dtype=torch.float32,
        device=torch.device("cpu"),
        transformer_impl="local",
        transformer={},
        ddp={},
        optimizer={"lr": 1e-2, "weight_decay": 0.0, "clip_grad": 1.0},
        lr_warmup_iters=0,
        max_tokens_per_micro_batch=128,
        max_response_len=LENGTH,
    )


def as_sequence(index: int, completion: Completion) -> TrainSequence:
    prompt, response = PROMPTS[index], completion.token_ids
    length = len(prompt) + len(response)
    places = slice(len(prompt) - 1, length - 1)
    mask, logprobs = np.zeros(length, dtype=bool), np.zeros(length, dtype=np.float32)
    mask[places], logprobs[places] = True, completion.logprobs
    return TrainSequence(
        uid=completion.uid,
        token_ids=np.concatenate([prompt, response]),
        loss_mask=mask,
        advantages=np.full(length, 1.0 if index % 2 else -1.0, dtype=np.float32),
        rollout_logprobs=logprobs,
        token_versions=np.where(mask, completion.weight_version, -1),
    )
