"""The command line of tools/plan.py: the training program's own flags, and those that say what the machines are."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_fipo.arguments import Settings, settings_from
from megatron_fipo.checks import check_architecture, check_layer_flags
from megatron_fipo.config import require
from megatron_fipo.engine_nodes import engines_of_nodes
from megatron_fipo.flags.command_line import Given, read_arguments
from megatron_fipo.flags.option import VALUE, Option, ValueType
from megatron_fipo.flags.table import all_options
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.planning.engines import GIB, MIB, Engine
from megatron_fipo.planning.layouts import Cost, Sizes, candidate_sizes, cost
from megatron_fipo.planning.memory import Cluster, Plan, Turns, default_reserve, plan_memory
from megatron_fipo.planning.training import OptimizerBytes, Recompute, Training
from megatron_fipo.weights.architecture import Architecture, read_architecture

_PLAN_OPTIONS: tuple[tuple[str, Literal["int", "float"], str], ...] = (
    ("nodes", "int", "machines (default: 1, or what --num-gpus needs)"),
    ("gpus-per-node", "int", "GPUs of each machine that ranks of the trainer have (default: 8)"),
    ("num-gpus", "int", "ranks of the trainer (default: --nodes x --gpus-per-node)"),
    ("gpu-memory-gib", "float", "memory of one GPU, GiB; with --device cpu main memory per rank (default: 80)"),
    (
        "reserve-gib",
        "float",
        "of it, for what is not counted: CUDA contexts, NCCL, fragments (default: 6, or 1/8; CPU 2.25)",
    ),
    ("expert-imbalance", "float", "tokens that the busiest rank's experts are sent, over the mean (default: 1.5)"),
)
_SEARCHED = {
    "megatron.tensor_model_parallel_size": "--tensor-model-parallel-size",
    "megatron.pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "megatron.context_parallel_size": "--context-parallel-size",
    "megatron.expert_model_parallel_size": "--expert-model-parallel-size",
}
_LAYOUT = (
    *_SEARCHED,
    "megatron.sequence_parallel",
    "megatron.expert_tensor_parallel_size",
    "megatron.num_layers_per_virtual_pipeline_stage",
    "megatron.num_virtual_stages_per_pipeline_rank",
)
_MOST_GPUS = 65536
_MOST_BLOCKS = 1_000_000  # layers, or experts in all of them
_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0}
_CACHE_BYTES = {"fp8_e5m2": 1.0, "fp8_e4m3": 1.0, "bf16": 2.0, "bfloat16": 2.0}
_FULL = {"granularity": "full", "method": "uniform", "num_layers": 1}


@dataclass(frozen=True)
class PlanRequest:
    """What the command line asks for. `fixed`: a layout was given, which is planned; else layouts are searched."""

    given: Mapping[str, Given]
    arch: Architecture
    cluster: Cluster
    expert_imbalance: float
    fixed: bool
    as_json: bool
    options: Mapping[str, Option]


@dataclass(frozen=True)
class Planned:
    """A layout's plan, its place in the order and the flags it takes beside those given."""

    plan: Plan
    cost: Cost
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Rejected:
    """A layout that does not work, and why."""

    sizes: Sizes
    recomputes: bool
    reason: str


def plan_options() -> list[Option]:
    """The flags of the tool alone."""
    options = [
        Option((f"plan.{name.replace('-', '_')}",), {f"--{name}": VALUE}, ValueType(kind), "plan", text)
        for name, kind, text in _PLAN_OPTIONS
    ]
    return [*options, Option(("plan.json",), {"--json": True}, ValueType("bool"), "plan", "print JSON, not tables")]


def plan_help_text() -> str:
    """The tool's own flags, and where the others are listed."""
    lines = ["usage: python tools/plan.py --hf-checkpoint DIR [the flags of megatron_fipo.train] [--nodes N] [...]", ""]
    for option in plan_options():
        lines.append(f"  {', '.join(option.flags)}")
        lines += textwrap.wrap(option.help, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    closing = "Without a flag of the layout (--tensor-model-parallel-size and so on) layouts are searched."
    return "\n".join([*lines, "", closing, "`python -m megatron_fipo.train --help` lists the program's flags."])


def parse_plan(words: Sequence[str]) -> PlanRequest:
    """Raises ValueError with one line that names the flag, the value found and the value wanted."""
    own = plan_options()
    options = [*all_options(), *own]
    given, _ = read_arguments(words, options)
    values = {name: given.pop(f"plan.{name}").value for name in _own_names(own) if f"plan.{name}" in given}
    nodes, per_node = values.get("nodes"), values.get("gpus_per_node", 8)
    require(per_node >= 1, "--gpus-per-node", per_node, ">= 1")
    require(nodes is None or nodes >= 1, "--nodes", nodes, ">= 1")
    num_gpus = values.get("num_gpus", (nodes or 1) * per_node)
    require(1 <= num_gpus <= _MOST_GPUS, "--num-gpus", num_gpus, f"between 1 and {_MOST_GPUS}")
    require(
        num_gpus <= per_node or num_gpus % per_node == 0,
        "--num-gpus",
        num_gpus,
        f"at most --gpus-per-node ({per_node}) or a multiple of it",
    )
    require(
        nodes is None or -(-num_gpus // per_node) == nodes,
        "--num-gpus",
        num_gpus,
        f"--nodes ({nodes}) x --gpus-per-node ({per_node}), or give one of them",
    )
    gib = values.get("gpu_memory_gib", 80.0)
    require(gib > 0, "--gpu-memory-gib", gib, "> 0 GiB")
    gpu_bytes = round(gib * GIB)
    reserve, default = values.get("reserve_gib"), default_reserve(gpu_bytes, on_cpu=_is_on_cpu(given))
    require(reserve is None or 0 <= reserve < gib, "--reserve-gib", reserve, f">= 0 and below --gpu-memory-gib ({gib})")
    imbalance = values.get("expert_imbalance", 1.5)
    require(imbalance >= 1, "--expert-imbalance", imbalance, ">= 1")
    checkpoint = given["run.hf_checkpoint"].value if "run.hf_checkpoint" in given else ""
    require(bool(checkpoint), "--hf-checkpoint", checkpoint, "a directory with a model's config.json")
    arch = read_architecture(checkpoint)
    blocks = arch.num_layers * (arch.num_moe_experts or 1)
    require(blocks <= _MOST_BLOCKS, f"{checkpoint}/config.json: layers x experts", blocks, f"at most {_MOST_BLOCKS}")
    return PlanRequest(
        given=given,
        arch=arch,
        cluster=Cluster(num_gpus, per_node, gpu_bytes, default if reserve is None else round(reserve * GIB)),
        expert_imbalance=imbalance,
        fixed=any(setting in given for setting in _LAYOUT),
        as_json=bool(values.get("json")),
        options={option.setting: option for option in options},
    )


def plan_given_layout(request: PlanRequest) -> Planned:
    """The plan of the layout that the flags say. Raises ValueError as the training program's checks do."""
    return _planned(request, request.given, ())


def search_layouts(request: PlanRequest) -> tuple[list[Planned], list[Rejected]]:
    """(layouts that fit, cheapest first; the others with the reason). Where recomputation is not decided by a flag, a
    layout that only fits with full recomputation is tried with it. Raises ValueError for what is wrong in any."""
    _check_uncut(request)
    fitting: list[Planned] = []
    rejected: list[Rejected] = []
    decides = "megatron.transformer.recompute_granularity" in request.given
    for sizes in candidate_sizes(request.arch, request.cluster.num_gpus, request.cluster.gpus_per_node):
        for recomputes in (False,) if decides else (False, True):
            given, flags = _with_layout(request, sizes, recomputes)
            try:
                planned = _planned(request, given, flags)
            except ValueError as error:
                rejected.append(Rejected(sizes, recomputes, str(error)))
                break
            if planned.plan.fits:
                fitting.append(planned)
                break
            if decides or recomputes:
                rejected.append(Rejected(sizes, recomputes, "; ".join(planned.plan.problems)))
    return sorted(fitting, key=lambda planned: planned.cost.seconds_per_token), rejected


def _check_uncut(request: PlanRequest) -> None:
    """Raise ValueError for what the checkpoint contradicts before it is cut into any layout."""
    settings = settings_from(_without_budget(request))
    whole = training_of(settings, request.arch, 1, request.expert_imbalance)
    check_architecture(settings, whole.layout)
    check_layer_flags(settings.megatron, request.arch, whole.transformer_impl)


def _is_on_cpu(given: Mapping[str, Given]) -> bool:
    return "megatron.device" in given and given["megatron.device"].value == "cpu"


def _own_names(options: Sequence[Option]) -> list[str]:
    return [option.setting.removeprefix("plan.") for option in options]


def _with_layout(request: PlanRequest, sizes: Sizes, recomputes: bool) -> tuple[dict[str, Given], tuple[str, ...]]:
    """What was given with a layout added, and that as flags; the token budget is the least where none was given."""
    values: dict[str, Any] = dict(zip(_SEARCHED, (sizes.tp, sizes.pp, sizes.cp, sizes.ep), strict=True))
    values = {setting: size for setting, size in values.items() if size > 1}
    if sizes.tp > 1:
        values["megatron.sequence_parallel"] = True
    if sizes.ep > 1:
        values["megatron.expert_tensor_parallel_size"] = 1
    if recomputes:
        values |= {f"megatron.transformer.recompute_{name}": value for name, value in _FULL.items()}
    if "batch.max_tokens_per_micro_batch" not in request.given:
        rollout = settings_from(_without_budget(request)).rollout
        longest = rollout.rollout_max_prompt_len + rollout.rollout_max_response_len
        values["batch.max_tokens_per_micro_batch"] = -(-longest // sizes.cp)
    given, flags = dict(request.given), []
    for setting, value in values.items():
        option = request.options[setting]
        flag = next(flag for flag, stored in option.flags.items() if stored is VALUE or stored is value)
        given[setting] = Given(option, flag, value)
        flags += [flag] if value is True else [flag, str(value)]
    return given, tuple(flags)


def _without_budget(request: PlanRequest) -> dict[str, Given]:
    """What was given with a budget that any length fits."""
    option = request.options["batch.max_tokens_per_micro_batch"]
    return {**request.given, option.setting: Given(option, next(iter(option.flags)), 2**40)}


def _planned(request: PlanRequest, given: Mapping[str, Given], flags: tuple[str, ...]) -> Planned:
    settings = settings_from(given)
    training = training_of(settings, request.arch, request.cluster.num_gpus, request.expert_imbalance)
    check_architecture(settings, training.layout)
    check_layer_flags(settings.megatron, request.arch, training.transformer_impl)
    engine, turns = engine_of(settings, request.arch, request.cluster)
    plan = plan_memory(training, engine, turns, request.cluster)
    mean_length = training.longest / 2
    of_layout = cost(training, request.cluster.gpus_per_node, settings.batch.global_batch_size, mean_length)
    return Planned(plan, of_layout, flags)


def training_of(settings: Settings, arch: Architecture, num_gpus: int, expert_imbalance: float) -> Training:
    """The trainer that a command line asks for on `num_gpus` ranks. Raises ValueError for a layout that is none."""
    megatron, batch = settings.megatron, settings.batch
    layout = ParallelLayout.for_world(
        num_gpus,
        0,
        tp=megatron.tensor_model_parallel_size,
        pp=megatron.pipeline_model_parallel_size,
        cp=megatron.context_parallel_size,
        sequence_parallel=megatron.sequence_parallel,
        vpp=megatron.virtual_stages(arch.num_layers),
        ep=megatron.expert_model_parallel_size,
        etp=megatron.expert_tensor_parallel_size,
    )
    fields, on_cpu = megatron.transformer, megatron.device == "cpu"
    gradient_bytes = 4 if not megatron.bf16 or megatron.ddp.get("grad_reduce_in_fp32", True) else 2
    return Training(
        arch=arch,
        layout=layout,
        vocab_divisible_by=int(megatron.model.get("make_vocab_size_divisible_by", 1)),
        dtype_bytes=2 if megatron.bf16 else 4,
        gradient_bytes=gradient_bytes,
        optimizer=_optimizer_bytes(settings, gradient_bytes),
        is_sharded=bool(megatron.ddp.get("use_distributed_optimizer", True)),
        overlaps_gradients=bool(megatron.ddp.get("overlap_grad_reduce", False)),
        transformer_impl=megatron.transformer_impl or ("local" if on_cpu else "transformer_engine"),
        on_cpu=on_cpu,
        rows=batch.max_tokens_per_micro_batch,
        longest=settings.rollout.rollout_max_prompt_len + settings.rollout.rollout_max_response_len,
        micro_batches=-(-batch.global_batch_size // layout.dp),
        chunk_size=batch.log_probs_chunk_size if batch.log_probs_chunk_size > 0 else 2**31,
        fuses_swiglu=bool(fields.get("bias_activation_fusion", False)),
        fuses_weight_gradient=bool(fields.get("gradient_accumulation_fusion", not on_cpu)),
        recompute=_recompute(fields),
        expert_imbalance=expert_imbalance,
    )


def _recompute(fields: Mapping[str, Any]) -> Recompute:
    """As TransformerConfig reads its fields: --moe-layer-recompute is selective, of experts too."""
    granularity, of_experts = fields.get("recompute_granularity"), bool(fields.get("moe_layer_recompute"))
    return Recompute(
        granularity="selective" if of_experts else granularity,
        method=fields.get("recompute_method"),
        num_layers=fields.get("recompute_num_layers") or 0,
        modules=frozenset(fields.get("recompute_modules") or ["core_attn"]) | ({"moe"} if of_experts else set()),
    )


def _optimizer_bytes(settings: Settings, gradient_bytes: int) -> OptimizerBytes:
    """fp32 masters of bf16 parameters and two fp32 moments, unless Transformer Engine's optimizer is told otherwise."""
    megatron, fields = settings.megatron, settings.megatron.optimizer
    if not fields.get("use_precision_aware_optimizer"):
        copy = 4.0 if gradient_bytes < 4 else 0.0
        return OptimizerBytes(4.0 if megatron.bf16 else 0.0, 8.0, copy)
    moments = sum(_BYTES[fields.get(name, "fp32")] for name in ("exp_avg_dtype", "exp_avg_sq_dtype"))
    master = _BYTES[fields.get("main_params_dtype", "fp32")]
    if master == 4 and megatron.bf16 and fields.get("store_param_remainders", True):
        master = 2.0  # the bits that the bf16 parameter lacks
    return OptimizerBytes(master, moments, 0.0)


def engine_of(settings: Settings, arch: Architecture, cluster: Cluster) -> tuple[Engine, Turns]:
    """The engines that a command line asks for, and how they share GPUs with the trainer."""
    engine, rollout, arguments = settings.engine, settings.rollout, settings.engine.server_args
    full, rest = divmod(cluster.num_gpus, cluster.gpus_per_node)
    num_engines = sum(engines_of_nodes(engine, [cluster.gpus_per_node] * full + [rest] * bool(rest)))
    dtype_bytes = 2 if settings.megatron.bf16 else 4
    cache = arguments.get("kv_cache_dtype", "auto")
    known = ("auto", *_CACHE_BYTES)
    require(cache in known, "--sglang-kv-cache-dtype", cache, f"one of {', '.join(known)}: others are not planned")
    response = max(rollout.rollout_max_response_len, settings.eval_max_response_len)
    of_engine = Engine(
        arch=arch,
        tp=engine.tp_size,
        dtype_bytes=dtype_bytes,
        is_fp8=engine.fp8_weights,
        cache_bytes=_CACHE_BYTES.get(cache, dtype_bytes),
        fraction=arguments.get("mem_fraction_static"),
        max_total_tokens=arguments.get("max_total_tokens"),
        longest=rollout.rollout_max_prompt_len + response,
        on_cpu=settings.megatron.device == "cpu",
    )
    turns = Turns(
        colocated=engine.placement == "colocated",
        offloads_trainer=engine.offload_trainer,
        bucket_bytes=engine.weight_bucket_mb * MIB,
        keeps_reference=settings.correction.kl_coef > 0,
        engines_per_rank=num_engines * engine.tp_size / cluster.num_gpus,
    )
    return of_engine, turns
