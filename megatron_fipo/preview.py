"""What a start would say of a command line, found in one process and without a GPU: `--print-config`.

All checks of a start are made but megatron-core's own and those that need the ranks, GPUs, graders or engines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_fipo.arguments import Collected, Settings
from megatron_fipo.checks import (
    check_checkpoint,
    check_device_flags,
    check_directories,
    check_engine_layout,
    check_layer_flags,
    check_wandb,
    choose_transformer_impl,
    layout_of,
    ranks_from_environment,
)
from megatron_fipo.cuda_environment import check_allocator
from megatron_fipo.data import make_sources
from megatron_fipo.engine_nodes import engines_of_nodes
from megatron_fipo.gpu_packages import check_fp8_engines, check_gpu_packages, check_quantised_training, find_packages
from megatron_fipo.losses.custom import load_custom_loss
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.problems import read_problems
from megatron_fipo.rewards import reward_name
from megatron_fipo.weights.architecture import Architecture, check_layout, read_architecture
from megatron_fipo.weights.fp8 import check_fp8
from megatron_fipo.weights.hf_files import HFWeights, check_hf_shapes

MOST_DATA_BYTES = 16 * 2**20  # of prompt files that are read for this: a few seconds


def preview(settings: Settings, environment: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what a start with these settings would refuse, what it would say beside or could not be checked), as far as one
    process can tell."""
    found, notes = Collected(), []
    if settings.run.hf_checkpoint:
        arch = found.of(read_architecture, settings.run.hf_checkpoint)
        if arch is not None:
            layout, layout_notes = _layout(settings, arch, environment, found)
            notes += layout_notes
            found.of(check_layout, arch, layout)
            found.of(check_engine_layout, settings.engine, arch)
            found.of(check_checkpoint, settings, layout)
            found.of(_check_weights, settings.run.hf_checkpoint, arch)  # whatever was said of the architecture
            notes += _check_on_device(settings, arch, layout, found)
    else:
        notes.append("--hf-checkpoint is not given, which a start needs: nothing was compared with the model")
    if settings.megatron.device != "cpu":
        found.of(check_allocator, settings, environment)
    found.of(check_directories, settings)
    found.of(check_wandb, settings)
    if settings.correction.custom_loss_function_path is not None:
        found.of(load_custom_loss, settings.correction.custom_loss_function_path)
    if settings.rollout.replay_rollouts is None:
        notes += _check_data(settings, found)
    return tuple(found.problems), tuple(notes)


def _check_weights(directory: str, arch: Architecture) -> None:
    check_hf_shapes(arch, HFWeights(directory))


def _layout(
    settings: Settings, arch: Architecture, environment: Mapping[str, str], found: Collected
) -> tuple[ParallelLayout, list[str]]:
    """The layout of the ranks that the environment tells of, or of the fewest there can be."""
    megatron = settings.megatron
    if "WORLD_SIZE" in environment or ("SLURM_NTASKS" in environment and "SLURM_STEP_ID" in environment):
        ranks = found.of(ranks_from_environment, environment)
        layout = None if ranks is None else found.of(layout_of, settings, ranks[1], 0, arch.num_layers)
        per_node = environment.get("LOCAL_WORLD_SIZE", "")
        if ranks is not None and per_node.isdecimal() and 0 < int(per_node) <= ranks[1]:
            found.of(engines_of_nodes, settings.engine, [int(per_node)] * (ranks[1] // int(per_node)))
        return layout or ParallelLayout(), []
    stage = megatron.tensor_model_parallel_size * megatron.context_parallel_size
    etp = megatron.expert_tensor_parallel_size or megatron.tensor_model_parallel_size
    experts = etp * megatron.expert_model_parallel_size if megatron.expert_model_parallel_size > 1 else 1
    fewest = megatron.pipeline_model_parallel_size * math.lcm(stage, experts)
    layout = found.of(layout_of, settings, max(1, fewest), 0, arch.num_layers)
    return layout or ParallelLayout(), [f"how many ranks there will be is not known here: {fewest}, or a multiple"]


def _check_on_device(settings: Settings, arch: Architecture, layout: ParallelLayout, found: Collected) -> list[str]:
    """The flags that are a matter of the device: as on GPUs unless --device is cpu. Where none is visible, what the CPU
    alone would refuse is returned as notes."""
    wanted, has_cuda = settings.megatron.device, torch.cuda.is_available()
    if wanted == "cpu" and not has_cuda:
        _check_flags(settings, arch, layout, torch.device("cpu"), found)
        return []
    _check_flags(settings, arch, layout, torch.device("cuda"), found)
    if settings.engine.fp8_weights:
        found.of(check_fp8, arch, settings.engine.tp_size)
    if has_cuda:
        impl = settings.megatron.transformer_impl or "transformer_engine"
        machine = find_packages(torch.cuda.get_device_capability(), torch.version.cuda)
        found.of(check_gpu_packages, impl, settings.megatron.transformer, arch, layout, machine)
        if settings.engine.fp8_weights:
            found.of(check_fp8_engines, arch, settings.engine.tp_size, machine)
        return []
    here = Collected()
    _check_flags(settings, arch, layout, torch.device("cpu"), here)
    if settings.engine.fp8_weights:
        here.of(check_fp8_engines, arch, settings.engine.tp_size, find_packages())
    return [
        f"no CUDA device is visible here, where a start would be refused: {problem}"
        for problem in here.problems
        if problem not in found.problems
    ]


def _check_flags(
    settings: Settings, arch: Architecture, layout: ParallelLayout, device: torch.device, found: Collected
) -> None:
    found.of(check_device_flags, settings, layout, device)
    found.of(check_quantised_training, settings.megatron.transformer)
    impl = found.of(choose_transformer_impl, settings, device)
    if impl is not None:
        found.of(check_layer_flags, settings.megatron, arch, impl)


def _check_data(settings: Settings, found: Collected) -> list[str]:
    """Read the problems as rank 0 does, where they are few; returns its notes, or what was not looked at."""
    data = settings.data
    if data.task is None and data.prompt_data is None:
        return ["neither --task nor --prompt-data is given, of which a start needs one"]
    found.of(reward_name, data)
    values = [data.prompt_data, *(value.rpartition("=")[2] for value in data.eval_prompt_data)]
    num_bytes = sum(_num_bytes(value) for value in values if value)
    if num_bytes > MOST_DATA_BYTES:
        return [f"prompts of {num_bytes / 2**20:.0f} MiB are read at the start, and were not read for this"]
    if not settings.run.hf_checkpoint or found.problems:  # there may be no tokenizer
        sources = found.of(make_sources, data, settings.run.seed)
        return [] if sources is None else list(sources[2])
    problems = found.of(read_problems, settings)
    return [] if problems is None else list(problems[3])


def _num_bytes(value: str) -> int:
    """Of a file, or of a directory, which a colon and a split may follow; 0 where there is neither."""
    path = Path(value) if Path(value).exists() else Path(value.rpartition(":")[0] or value)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0
