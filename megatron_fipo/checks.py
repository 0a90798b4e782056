"""What can be known to be wrong before anything is started: the checkpoint, the layout, and what is not built yet."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_fipo.arguments import Collected, Settings, architecture_differences
from megatron_fipo.config import require
from megatron_fipo.cuda_environment import check_allocator
from megatron_fipo.flags.megatron_table import flag_of_field
from megatron_fipo.gpu_packages import check_fp8_engines, check_gpu_packages, find_packages
from megatron_fipo.losses.custom import load_custom_loss
from megatron_fipo.megatron_config import MegatronSettings
from megatron_fipo.metrics.records import EVALUATIONS_FILE, METRICS_FILE, SAMPLES_FILE
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.run_config import EngineSettings
from megatron_fipo.weights.architecture import (
    Architecture,
    check_layout,
    read_architecture,
)
from megatron_fipo.weights.hf_files import HFWeights, check_hf_shapes, check_replaceable
from megatron_fipo.weights.source import WeightSource
from megatron_fipo.weights.stored_names import TRACKER

LATEST = "latest"  # in a directory of checkpoints, once there is a whole one
NEED_TRANSFORMER_ENGINE = frozenset(
    "cp_comm_type fp4 fp8 moe_grouped_gemm moe_permute_fusion moe_router_fusion tp_comm_overlap "
    "use_precision_aware_optimizer use_te_activation_func".split()
)
RECOMPUTED_BY_TRANSFORMER_ENGINE = frozenset({"layernorm", "moe_act"})  # of --recompute-modules


@dataclass(frozen=True, eq=False)
class Checked:
    """A rank's part in a run that nothing speaks against so far."""

    layout: ParallelLayout
    device: torch.device
    transformer_impl: str
    arch: Architecture
    weights: WeightSource


def check_run(settings: Settings, environment: Mapping[str, str]) -> Checked:
    """All checks that need no other rank, no Megatron and no engine, in a second or two. Every rank calls this.

    Raises ValueError naming flag, file or variable.
    """
    rank, world_size = ranks_from_environment(environment)
    layout = layout_of(settings, world_size, rank, read_architecture(settings.run.hf_checkpoint).num_layers)
    device = choose_device(settings.megatron.device)
    check_device_flags(settings, layout, device)
    if device.type == "cuda":
        check_allocator(settings, environment)
    arch, weights = check_checkpoint(settings, layout)
    check_directories(settings)
    check_wandb(settings)
    if settings.correction.custom_loss_function_path is not None:
        load_custom_loss(settings.correction.custom_loss_function_path)
    transformer_impl = choose_transformer_impl(settings, device)
    check_layer_flags(settings.megatron, arch, transformer_impl)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    machine = find_packages(capability, torch.version.cuda)
    check_gpu_packages(transformer_impl, settings.megatron.transformer, arch, layout, machine)
    if settings.engine.fp8_weights:
        check_fp8_engines(arch, settings.engine.tp_size, machine)
    return Checked(layout, device, transformer_impl, arch, weights)


def layout_of(settings: Settings, world_size: int, rank: int, num_layers: int) -> ParallelLayout:
    """The layout of `world_size` ranks. Raises ValueError naming the flags where they do not divide that."""
    megatron = settings.megatron
    return ParallelLayout.for_world(
        world_size,
        rank,
        tp=megatron.tensor_model_parallel_size,
        pp=megatron.pipeline_model_parallel_size,
        cp=megatron.context_parallel_size,
        sequence_parallel=megatron.sequence_parallel,
        vpp=megatron.virtual_stages(num_layers),
        ep=megatron.expert_model_parallel_size,
        etp=megatron.expert_tensor_parallel_size,
    )


def check_device_flags(settings: Settings, layout: ParallelLayout, device: torch.device) -> None:
    """Raise ValueError naming a flag that trains wrongly, or does nothing, on this kind of device."""
    _check_pipeline_overlap(settings, layout, device)
    nccl_buffers = settings.megatron.ddp.get("nccl_ub", False)
    require(device.type == "cuda" or not nccl_buffers, "--use-nccl-ub", True, "absent where there is no CUDA device")


def check_wandb(settings: Settings) -> None:
    """Raise ValueError where the run is to be logged with a package that is missing."""
    require(
        settings.run.wandb_project is None or importlib.util.find_spec("wandb") is not None,
        "--wandb-project",
        settings.run.wandb_project,
        "absent where the package wandb is not installed: pip install wandb",
    )


def ranks_from_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, world size) as torchrun, or srun, sets them. Raises ValueError when neither did."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in environment and world in environment:
            for name in (rank, world):
                require(environment[name].isdecimal(), f"the variable {name}", environment[name], "a whole number")
            require(
                int(environment[rank]) < int(environment[world]),
                f"the variable {rank}",
                int(environment[rank]),
                f"less than {world} ({environment[world]})",
            )
            return int(environment[rank]), int(environment[world])
    raise ValueError(
        "RANK and WORLD_SIZE are not set: start with torchrun --nproc-per-node N -m megatron_fipo.train ..."
    )


def choose_device(wanted: str) -> torch.device:
    """The device of this rank, as `--device` wants it. Raises ValueError when the one asked for is not there."""
    has_cuda = torch.cuda.is_available()
    require(wanted != "cuda" or has_cuda, "--device", wanted, "cpu or auto: no CUDA device is visible")
    require(
        wanted != "cpu" or not has_cuda,
        "--device",
        wanted,
        "cuda or auto where a CUDA device is visible: hide it with CUDA_VISIBLE_DEVICES= to train on the CPU",
    )
    if has_cuda:
        device = torch.device("cuda", _own_device(os.environ, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def _own_device(environment: Mapping[str, str], num_visible: int) -> int:
    """The number of this rank's GPU among those that it sees, which must be all of its node's: the first rank starts
    the node's engines on them and hands them weights that lie on its own."""
    name = "LOCAL_RANK" if "LOCAL_RANK" in environment else "SLURM_LOCALID"
    own = int(environment.get(name, "0"))
    num_ranks = max(own + 1, _num_ranks_here(environment))
    if num_ranks > num_visible:
        shown = environment.get("CUDA_VISIBLE_DEVICES")
        visible = "is not set" if shown is None else f"is {shown!r}"
        raise ValueError(
            f"the variable {name} is {own}, of at least {num_ranks} ranks on this node, but CUDA_VISIBLE_DEVICES "
            f"{visible}, and shows this rank {num_visible} GPU{'s' * (num_visible > 1)}: every rank must see a GPU for "
            "each rank of its node (with srun --gpus-per-node, not --gpus-per-task or --gpu-bind)"
        )
    return own


def _num_ranks_here(environment: Mapping[str, str]) -> int:
    """The ranks of this node, by torchrun or srun; 1 where neither says."""
    if "LOCAL_RANK" in environment:
        return int(environment.get("LOCAL_WORLD_SIZE", "1"))
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))  # as in "8(x3),4"
    counts = [int(count) for count, times in runs for _ in range(int(times or 1))]
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 1


def choose_transformer_impl(settings: Settings, device: torch.device) -> str:
    """The layers' implementation: Transformer Engine on CUDA, local on the CPU, unless a flag says otherwise."""
    chosen = settings.megatron.transformer_impl
    if chosen is None:
        return "transformer_engine" if device.type == "cuda" else "local"
    require(
        chosen == "local" or device.type == "cuda",
        "--transformer-impl",
        chosen,
        "local where there is no CUDA device",
    )
    return chosen


def check_layer_flags(megatron: MegatronSettings, arch: Architecture, transformer_impl: str) -> None:
    """Raise ValueError naming every flag that the model, or the implementation of its layers, cannot follow."""
    explicit, found = {**megatron.transformer, **megatron.optimizer}, Collected()
    for name, value in explicit.items():
        if name.startswith("moe_"):
            where = f"absent: the checkpoint's model ({arch.family}) has no experts"
            found.of(require, arch.num_moe_experts is not None, flag_of_field(name), value, where)
        found.of(
            require,
            not value or name not in NEED_TRANSFORMER_ENGINE or transformer_impl == "transformer_engine",
            flag_of_field(name),
            value,
            f"absent with --transformer-impl {transformer_impl}: it needs Transformer Engine",
        )
    modules = explicit.get("recompute_modules") or ()
    for module in sorted(RECOMPUTED_BY_TRANSFORMER_ENGINE.intersection(modules)):
        where = f"another with --transformer-impl {transformer_impl}: it needs Transformer Engine"
        found.of(require, transformer_impl == "transformer_engine", "--recompute-modules", module, where)
    is_grouped = bool(explicit.get("moe_grouped_gemm")) or "moe_act" not in modules
    found.of(require, is_grouped, "--recompute-modules", "moe_act", "another without --moe-grouped-gemm")
    chunks = megatron.pipeline_model_parallel_size * (found.of(megatron.virtual_stages, arch.num_layers) or 1)
    together = explicit.get("recompute_num_layers") or 1
    found.of(
        require,
        explicit.get("recompute_method") != "uniform" or (arch.num_layers // chunks) % together == 0,
        "--recompute-num-layers",
        together,
        f"a divisor of a pipeline stage's {arch.num_layers // chunks} layers with --recompute-method uniform",
    )
    cp, groups = megatron.context_parallel_size, arch.num_query_groups // megatron.tensor_model_parallel_size
    found.of(
        require,
        explicit.get("cp_comm_type") != "a2a" or groups % cp == 0,
        "--cp-comm-type",
        "a2a",
        f"another: its ranks share out heads, and {groups} query groups do not divide by --context-parallel-size {cp}",
    )
    found.raise_them()


def check_checkpoint(settings: Settings, layout: ParallelLayout) -> tuple[Architecture, WeightSource]:
    """`check_architecture`, and the header of the weights.

    Raises ValueError naming file or flag, for a missing or damaged checkpoint too.
    """
    directory = settings.run.hf_checkpoint
    arch = check_architecture(settings, layout)
    weights = HFWeights(directory)
    check_hf_shapes(arch, weights)
    pretrained = settings.run.pretrained_checkpoint
    if pretrained is None:
        return arch, weights
    from megatron_fipo.actor.inspection import find_any_checkpoint
    from megatron_fipo.actor.megatron_weights import MegatronWeights

    try:
        return arch, MegatronWeights(find_any_checkpoint(pretrained), arch)
    except ValueError as error:
        raise ValueError(f"--pretrained-checkpoint: {error}") from error


def check_architecture(settings: Settings, layout: ParallelLayout) -> Architecture:
    """Read the Hugging Face checkpoint's config.json and compare it with the flags and the layout.

    Raises ValueError naming file or flag: flags that contradict it, a layout that does not divide it, prompts and
    responses longer than its context.
    """
    directory = settings.run.hf_checkpoint
    arch = read_architecture(directory)
    differences = architecture_differences(settings.megatron, arch)
    if differences:
        raise ValueError("; ".join(differences))
    check_layout(arch, layout)
    check_engine_layout(settings.engine, arch)
    _check_engines_take_weights(settings.engine)
    for flag, response_len in (
        ("--rollout-max-response-len", settings.rollout.rollout_max_response_len),
        ("--eval-max-response-len", settings.eval_max_response_len),
    ):
        longest = settings.rollout.rollout_max_prompt_len + response_len
        require(
            longest <= arch.max_position_embeddings,
            f"--rollout-max-prompt-len + {flag}",
            longest,
            f"at most the checkpoint's context, {arch.max_position_embeddings} tokens ({directory}/config.json)",
        )
    require(
        settings.batch.global_batch_size >= layout.dp,
        "--global-batch-size",
        settings.batch.global_batch_size,
        f"at least the number of data-parallel ranks ({layout.dp})",
    )
    return arch


def check_engine_layout(engine: EngineSettings, arch: Architecture) -> None:
    """Raise ValueError unless an engine's ranks cut attention and FFN evenly; of experts, only those that do not share
    them out."""
    tp, flag = engine.tp_size, "--rollout-num-gpus-per-engine"
    ep = engine.server_args.get("ep_size", 1)
    require(ep >= 1 and tp % ep == 0, "--sglang-ep-size", ep, f"a divisor of {flag} ({tp})")
    ffn, what = arch.ffn_hidden_size, "FFN channels"
    if arch.num_moe_experts:
        ffn, what = (arch.moe_ffn_hidden_size or 0) * ep, f"FFN channels of an expert x --sglang-ep-size ({ep})"
    for count, name in ((arch.num_attention_heads, "attention heads"), (ffn, what)):
        require(count % tp == 0, flag, tp, f"a divisor of the checkpoint's {count} {name}")


def _check_engines_take_weights(engine: EngineSettings) -> None:
    """SGLang quantises what it reads at its start, not what it is sent."""
    for name in ("quantization", "torchao_config", "modelopt_quant", "rl_quant_profile"):
        value = engine.server_args.get(name)
        flag = f"--sglang-{name.replace('_', '-')}"
        require(not value, flag, value, "left out: engines are sent the trainer's weights; in FP8 with --rollout-fp8")


def _check_pipeline_overlap(settings: Settings, layout: ParallelLayout, device: torch.device) -> None:
    """Interleaved stages communicate while they compute on NCCL, and must not on gloo."""
    fields = settings.megatron.transformer
    require(
        device.type == "cuda" or not fields.get("overlap_p2p_comm_warmup_flush"),
        "--overlap-p2p-communication-warmup-flush",
        True,
        "absent where there is no CUDA device: on gloo, pipeline communication that overlaps gives wrong gradients",
    )
    require(
        device.type != "cuda" or layout.vpp == 1 or layout.pp > 2 or fields.get("overlap_p2p_comm", True),
        "--no-overlap-p2p-communication",
        True,
        "absent with interleaved stages on --pipeline-model-parallel-size 2: both neighbours are the same rank",
    )


def check_directories(settings: Settings) -> None:
    """What is to be read exists, and what is to be written can be, without writing over anything."""
    run, rollout = settings.run, settings.rollout
    for flag, directory in (("--load", run.load), ("--save", run.save)):
        if directory is not None and Path(directory, TRACKER).is_file():
            raise ValueError(
                f"{flag} is {directory!r}, which holds a checkpoint of Megatron-LM's own ({TRACKER}), but "
                "must be a directory of this run: --pretrained-checkpoint starts from the weights of the other"
            )
    if run.load is not None:
        require(
            holds_checkpoints(run.load),
            "--load",
            run.load,
            "a directory of this program's checkpoints: it has no `latest`. To begin anew leave it out, and "
            "--exit-on-missing-checkpoint; --pretrained-checkpoint takes the weights of Megatron-LM's",
        )
    if rollout.replay_rollouts is not None:
        require(Path(rollout.replay_rollouts).is_dir(), "--replay-rollouts", rollout.replay_rollouts, "a directory")
    for flag, directory in (
        ("--output-dir", run.output_dir),
        ("--save", run.save),
        ("--export-hf", run.export_hf),
        ("--record-rollouts", rollout.record_rollouts),
        ("--tensorboard-dir", run.tensorboard_dir),
    ):
        if directory is not None:
            require(directory != "", flag, directory, "a directory")
            _check_writable(flag, Path(directory))
    if run.export_hf is not None:
        check_replaceable(Path(run.export_hf).absolute(), Path(run.hf_checkpoint).absolute())
    for name in (METRICS_FILE, EVALUATIONS_FILE, SAMPLES_FILE):
        path = Path(run.output_dir, name)
        is_fresh = run.load is None and not run.auto_resume
        if is_fresh and path.is_file() and path.stat().st_size > 0:
            raise ValueError(
                f"--output-dir is {run.output_dir!r}, which already holds the records of a run ({name}), but a fresh "
                "run must have a directory of its own; --load or --auto-resume resumes a run"
            )


def holds_checkpoints(directory: str) -> bool:
    """Whether something in `directory` is, or was, a checkpoint of a run."""
    return Path(directory, LATEST).exists() or any(path.is_dir() for path in Path(directory).glob("step_*"))


def _check_writable(flag: str, directory: Path) -> None:
    """Raise ValueError unless `directory` is one, or can be made, and files can be written to it."""
    for path in (directory, *directory.absolute().parents):
        if path.exists() or path.is_symlink():
            require(path.is_dir(), flag, str(directory), f"a directory, but {path} is a file")
            require(os.access(path, os.W_OK | os.X_OK), flag, str(directory), f"writable, but {path} is not")
            return
