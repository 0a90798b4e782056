"""A run's memory, turn by turn, on the GPU that has least left: what `tools/plan.py` shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_fipo.planning.activations import ActivationBytes, activation_bytes
from megatron_fipo.planning.engines import GIB, MIB, Engine, EngineBytes, engine_bytes
from megatron_fipo.planning.states import StateBytes, num_parameters, state_bytes
from megatron_fipo.planning.training import Training

_BUCKETS = 3  # one that is packed and two that the engine loads (weights/buffers.py)
_PIECES = 2  # on their way to the rank that packs (actor/weight_stream.py), which also cuts small models' buckets
_SMALLEST_BUCKET = 16 * MIB
_SAVED_BYTES = 12  # of the optimizer for each parameter: master and moments in fp32, whatever they are while it trains


@dataclass(frozen=True)
class Cluster:
    """The machines: `num_gpus` ranks of the trainer, `reserve_bytes` of each GPU for what is not counted."""

    num_gpus: int
    gpus_per_node: int
    gpu_bytes: int
    reserve_bytes: int


@dataclass(frozen=True)
class Turns:
    """How trainer and engines share the GPUs."""

    colocated: bool
    offloads_trainer: bool
    bucket_bytes: int
    keeps_reference: bool
    engines_per_rank: float = 1.0  # engines' ranks over the trainer's, where both live in main memory


@dataclass(frozen=True)
class Turn:
    """One turn on one GPU: bytes by part, in the order shown."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What a run takes. `turns` are those of the pipeline rank that needs most in training."""

    training: Training
    cluster: Cluster
    states: StateBytes
    engine: EngineBytes
    turns: tuple[Turn, ...]
    worst_stage: int
    stage_totals: tuple[int, ...]  # of the training turn, by pipeline rank
    parameters_of_rank: int  # numbers, not bytes
    concurrent_sequences: int  # of the longest, in one engine's cache
    main_memory_per_node: int
    save_memory_per_node: int  # main memory, too, while a checkpoint is written
    problems: tuple[str, ...]  # why it does not fit; none: it does

    @property
    def fits(self) -> bool:
        """Whether every turn fits the GPU."""
        return not self.problems

    @property
    def peak(self) -> int:
        """Of the turn that takes most."""
        return max(turn.total for turn in self.turns)


def plan_memory(training: Training, engine: Engine, turns: Turns, cluster: Cluster) -> Plan:
    """Work out every turn of every pipeline rank; the rank that trains with most memory stands for all."""
    by_stage: list[tuple[int, StateBytes, ActivationBytes]] = []
    pp = training.layout.pp
    states_of = {stage: state_bytes(training, stage) for stage in {0, min(1, pp - 1), pp - 1}}
    for stage in range(pp):
        states = states_of.get(stage) or states_of[1]  # all but the first and the last are alike
        activations = activation_bytes(training, stage)
        by_stage.append((states.total + activations.total, states, activations))
    worst = max(range(len(by_stage)), key=lambda stage: by_stage[stage][0])
    _, states, activations = by_stage[worst]
    reserve = {"reserve": cluster.reserve_bytes}
    if engine.on_cpu:
        engine = replace(engine, max_total_tokens=engine.max_total_tokens or _cpu_cache_tokens(engine.longest))
    of_engine = engine_bytes(engine, _free_at_start(cluster), cluster.gpu_bytes)
    held = {"parameters": states.parameters, "gradients": states.gradients, "optimizer": states.optimizer}
    training_turn = {
        **held,
        "activations": activations.saved + activations.recomputed,
        "logits": activations.logits,
        "working memory": activations.working,
        **reserve,
    }
    leaves = turns.colocated and turns.offloads_trainer and not engine.on_cpu
    model_bytes = of_engine.weights * engine.tp
    bucket = min(turns.bucket_bytes, max(_SMALLEST_BUCKET, model_bytes * 17 // 64))
    buckets = {"weight buckets": (_BUCKETS + _PIECES) * bucket}
    sleeping: Mapping[str, int] = {"engine weights": of_engine.weights}
    awake: Mapping[str, int] = {**sleeping, "KV cache": of_engine.cache, "engine runtime": of_engine.runtime}
    if engine.on_cpu:  # nothing leaves main memory
        awake = {part: round(size * turns.engines_per_rank) for part, size in awake.items()}
        training_turn, held, sleeping = {**training_turn, **awake}, {**held, **awake}, awake
    where = "" if turns.colocated or engine.on_cpu else " (the engine's own GPU)"
    if where:
        sleeping = {}
    while_syncing = {"parameters": states.parameters} if leaves else held
    while_generating = {} if leaves or where else held
    all_turns = (
        Turn("training", training_turn),
        Turn("syncing", {**while_syncing, **sleeping, **buckets, **reserve}),
        Turn("generating" + where, {**while_generating, **awake, **reserve}),
    )
    ranks_per_node = min(cluster.gpus_per_node, cluster.num_gpus)
    away = states.parameters + states.optimizer if leaves else 0
    main_memory = away + (states.parameters if turns.keeps_reference else 0)
    plan = Plan(
        training=training,
        cluster=cluster,
        states=states,
        engine=of_engine,
        turns=all_turns,
        worst_stage=worst,
        stage_totals=tuple(total + all_turns[0].total - by_stage[worst][0] for total, _, _ in by_stage),
        parameters_of_rank=num_parameters(training, worst),
        concurrent_sequences=of_engine.cache_tokens // engine.longest,
        main_memory_per_node=main_memory * ranks_per_node,
        save_memory_per_node=0 if engine.on_cpu else _save_bytes(training, states, ranks_per_node),
        problems=(),
    )
    return replace(plan, problems=_problems(plan, engine))


def _save_bytes(training: Training, states: StateBytes, ranks_per_node: int) -> int:
    """Main memory of the node that copies most while it saves: every rank's shard of masters and moments in fp32, and
    the weights of each share of the model whose first data-parallel rank is there."""
    layout, optimizer = training.layout, training.optimizer
    shard = states.optimizer / (optimizer.master + optimizer.moments)
    stages = min(layout.pp, max(1, ranks_per_node // (layout.tp * layout.cp * layout.dp)))
    shares = min(ranks_per_node, max(layout.tp, layout.ep * layout.etp)) * stages
    return round(ranks_per_node * shard * _SAVED_BYTES) + shares * states.parameters


def _problems(plan: Plan, engine: Engine) -> tuple[str, ...]:
    limit = plan.cluster.gpu_bytes
    found = []
    for turn in plan.turns:
        if turn.total > limit:
            said = f"{turn.name} takes {turn.total / GIB:.1f} GiB of {limit / GIB:.1f} ({_largest(turn)})"
            found.append(
                said + (_levers(plan.training) if turn.name == "training" else _fraction_that_fits(plan, turn))
            )
    if plan.engine.cache_tokens < engine.longest:
        found.append(
            f"an engine's cache holds {plan.engine.cache_tokens} tokens, less than one longest sequence "
            f"({engine.longest}): raise --sglang-mem-fraction-static ({plan.engine.fraction:.2f}) or "
            f"--rollout-num-gpus-per-engine ({engine.tp})"
        )
    return tuple(found)


def _levers(training: Training) -> str:
    """What else would lower the activations in this layout."""
    least, levers = -(-training.longest // training.layout.cp), []
    if training.rows > least:
        levers.append(f"--max-tokens-per-micro-batch may be as low as {least}")
    if training.recompute.granularity != "full":
        levers.append("--recompute-granularity full keeps least")
    return f": {', '.join(levers)}" if levers else ""


def _fraction_that_fits(plan: Plan, turn: Turn) -> str:
    """How the engine's cache could make room, where that is all that is needed."""
    cache = turn.parts.get("KV cache", 0)
    too_much = turn.total - plan.cluster.gpu_bytes
    if cache <= too_much:
        return ""
    fraction = plan.engine.fraction - too_much / _free_at_start(plan.cluster)
    return f": --sglang-mem-fraction-static {math.floor(fraction * 100) / 100:.2f} leaves room"


def _free_at_start(cluster: Cluster) -> int:
    """Of a GPU when its engine starts, alone: half of the reserve is taken."""
    return max(1, cluster.gpu_bytes - cluster.reserve_bytes // 2)


def _largest(turn: Turn) -> str:
    parts = sorted(turn.parts.items(), key=lambda part: -part[1])[:2]
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)


def _cpu_cache_tokens(longest: int) -> int:
    """What rollout/server_process.py gives an engine on the CPU."""
    context = longest + 8
    return max(context, min(128 * context, 65536))


def default_reserve(gpu_bytes: int, *, on_cpu: bool) -> int:
    """For what is not counted: 6 GiB of a large GPU, an eighth of a small one; on the CPU what interpreters of a rank
    and of its share of an engine were measured to take."""
    return round(2.25 * GIB) if on_cpu else min(6 * GIB, gpu_bytes // 8 // MIB * MIB)
