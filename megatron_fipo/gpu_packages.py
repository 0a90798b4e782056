"""What Transformer Engine, Apex and the GPU must be for the layers and the precision that flags ask for.

Functions of versions and numbers: nothing here imports those packages or touches a device. What each recipe needs is
what Transformer Engine's and megatron-core's sources demand, where they would stop a run half way through its start.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from packaging.version import InvalidVersion, Version

from megatron_fipo.config import require
from megatron_fipo.flags.megatron_table import flag_of_field
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights.architecture import Architecture
from megatron_fipo.weights.fp8 import check_fp8

TRANSFORMER_ENGINE: Final = "2.20.2"
"""The release that requirements/gpu.txt pins."""
OLDEST_TRANSFORMER_ENGINE: Final = "2.3.0"
"""The first with all four FP8 recipes; from here on megatron-core calls it in one and the same way."""
INSTALL_TRANSFORMER_ENGINE: Final = (
    "NVTE_PYTORCH_FORCE_BUILD=TRUE pip install --no-build-isolation "
    f"'transformer-engine[core_cu13,pytorch]=={TRANSFORMER_ENGINE}'"
)
APEX: Final = "26.09"
"""The tag of NVIDIA's repository that the Dockerfile builds; PyPI's `apex` is another project."""
INSTALL_APEX: Final = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation --no-deps "
    f"'apex @ git+https://github.com/NVIDIA/apex@{APEX}'"
)
APEX_EXTENSION: Final = "fused_weight_gradient_mlp_cuda"
"""The module of NVIDIA's Apex that megatron-core's own linear layers call."""


@dataclass(frozen=True)
class Machine:
    """What a rank finds: None for what is not there."""

    transformer_engine: str | None  # its version
    apex: str | None  # the version of a distribution of that name
    has_apex_extension: bool
    capability: tuple[int, int] | None = None  # of this rank's GPU
    cuda: tuple[int, int] | None = None  # that torch was built with


@dataclass(frozen=True)
class Recipe:
    """What a way of scaling needs: the oldest Transformer Engine and CUDA, a GPU from `least` on and before `below`."""

    transformer_engine: str
    least: tuple[int, int]
    below: tuple[int, int] | None
    cuda: tuple[int, int] | None
    multiple: int  # of what each rank's share of a weight's rows and columns must be
    gpus: str


RECIPES: Final[Mapping[str, Recipe]] = {
    "delayed": Recipe("1.0.0", (8, 9), None, None, 16, "Ada, Hopper or newer"),
    "tensorwise": Recipe("2.2.0", (8, 9), None, None, 16, "Ada, Hopper or newer"),
    "blockwise": Recipe("2.3.0", (9, 0), None, (12, 9), 16, "Hopper or newer"),
    "mxfp8": Recipe("2.1.0", (10, 0), (12, 0), None, 32, "Blackwell data-center GPUs (B200, GB200, B300)"),
    "custom": Recipe("2.9.0", (8, 9), None, None, 16, "Ada, Hopper or newer"),
    "nvfp4": Recipe("2.7.0", (10, 0), None, None, 32, "Blackwell"),
}
"""--fp8-recipe's, and --fp4-recipe's nvfp4."""

_OF_FP8 = (
    *("fp8_recipe", "fp8_param", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad"),
    *("fp8_dot_product_attention", "fp8_multi_head_attention", "fp8_quantizer_factory"),
)
_OF_DELAYED = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad")
_OF_BF16_LAYERS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
_REFUSED = {
    "fp8_dot_product_attention": "absent: samples are packed, and its FP8 attention takes no packs",
    "fp8_multi_head_attention": "absent: samples are packed, and its FP8 attention takes no packs",
    "fp8_output_proj": "absent: log-probs come from a vocabulary projection of this project's own, in bf16",
    "fp8_param": "absent: Megatron would make the fp32 masters before the checkpoint's weights are there",
    "fp4_param": "absent: Megatron would make the fp32 masters before the checkpoint's weights are there",
}


def find_packages(capability: tuple[int, int] | None = None, cuda: str | None = None) -> Machine:
    """The versions installed here; `cuda` as torch.version.cuda gives it."""
    return Machine(
        transformer_engine=_installed("transformer-engine"),
        apex=_installed("apex"),
        has_apex_extension=importlib.util.find_spec(APEX_EXTENSION) is not None,
        capability=capability,
        cuda=None if cuda is None else (int(cuda.split(".")[0]), int(cuda.split(".")[1])),
    )


def check_gpu_packages(
    transformer_impl: str, fields: Mapping[str, Any], arch: Architecture, layout: ParallelLayout, machine: Machine
) -> None:
    """Raise ValueError for layers and precision that this machine, or megatron-core, cannot follow.

    `fields` are the explicit ones of TransformerConfig (MegatronSettings.transformer).
    """
    if transformer_impl == "transformer_engine":
        _require_transformer_engine("--transformer-impl", transformer_impl, OLDEST_TRANSFORMER_ENGINE, machine)
    elif machine.capability is not None and fields.get("gradient_accumulation_fusion", True):
        _require_apex(machine)
    check_quantised_training(fields)
    if fields.get("fp8") or fields.get("fp4"):
        _check_recipe(fields, arch, layout, machine)


def check_fp8_engines(arch: Architecture, tp_size: int, machine: Machine) -> None:
    """Raise ValueError where engines of `tp_size` ranks cannot hold the model in FP8, or the GPU cannot compute it."""
    flag, capability = "--rollout-fp8", machine.capability
    if capability is None:
        raise ValueError(f"{flag} is set, but engines on a CPU hold fp32 or bf16 weights: leave it out")
    least = RECIPES["tensorwise"].least
    found = f"this GPU has compute capability {_dotted(capability)}, and FP8 needs {_dotted(least)}"
    require(capability >= least, flag, True, f"left out: {found}")
    check_fp8(arch, tp_size)


def check_quantised_training(fields: Mapping[str, Any]) -> None:
    """Raise ValueError naming a flag of FP8 or FP4 training that others leave without an effect, or contradict."""
    for name, why in _REFUSED.items():
        require(not fields.get(name), flag_of_field(name), fields.get(name), why)
    recipe = fields.get("fp8_recipe", "delayed")
    for name in _OF_FP8:
        require(
            name not in fields or fields.get("fp8") is not None,
            *(_flag(name), fields.get(name), "used with --fp8-format e4m3 or hybrid"),
        )
    for name in _OF_DELAYED:
        require(
            name not in fields or recipe == "delayed",
            *(_flag(name), fields.get(name), f"used with --fp8-recipe delayed: {recipe} keeps no history"),
        )
    length = fields.get("fp8_amax_history_len", 1)
    require(length >= 1, "--fp8-amax-history-len", length, ">= 1 passes")
    require(
        "fp4_recipe" not in fields or bool(fields.get("fp4")),
        "--fp4-recipe",
        fields.get("fp4_recipe"),
        "used with --fp4-format",
    )
    require(
        not (fields.get("fp4") and fields.get("fp8")), "--fp4-format", fields.get("fp4"), "absent with --fp8-format"
    )
    some_bf16 = fields.get("first_last_layers_bf16", False)
    require(
        not some_bf16 or (bool(fields.get("fp8")) and recipe != "delayed"),
        "--first-last-layers-bf16",
        some_bf16,
        "used with --fp8-format and another --fp8-recipe than delayed, whose scales belong to all layers at once",
    )
    for name in _OF_BF16_LAYERS:
        require(
            name not in fields or some_bf16, flag_of_field(name), fields.get(name), "used with --first-last-layers-bf16"
        )


def _check_recipe(fields: Mapping[str, Any], arch: Architecture, layout: ParallelLayout, machine: Machine) -> None:
    if fields.get("fp4"):
        flag, name = "--fp4-recipe", str(fields.get("fp4_recipe", "nvfp4"))
    else:
        flag, name = "--fp8-recipe", str(fields.get("fp8_recipe", "delayed"))
    require(name in RECIPES, flag, name, f"one of {', '.join(RECIPES)}")
    needs = RECIPES[name]
    _require_transformer_engine(flag, name, needs.transformer_engine, machine)
    capability = machine.capability
    if capability is not None:
        fits = capability >= needs.least and (needs.below is None or capability < needs.below)
        found = f"it has compute capability {_dotted(capability)}, and {name} needs {needs.gpus}"
        require(fits, flag, name, f"one that this GPU computes: {found}")
        require(
            needs.cuda is None or (machine.cuda is not None and machine.cuda >= needs.cuda),
            flag,
            name,
            f"another with this torch, built with CUDA {_dotted(machine.cuda)}: {name} needs {_dotted(needs.cuda)}",
        )
    ffn = arch.ffn_hidden_size // layout.tp
    if arch.num_moe_experts:
        ffn = (arch.moe_ffn_hidden_size or 0) // layout.etp
    rows = (arch.num_attention_heads + 2 * arch.num_query_groups) * arch.kv_channels
    for size, what in (
        (arch.hidden_size, "hidden size"),
        (rows // layout.tp, "rows of query, key and value on a tensor-parallel rank"),
        (arch.num_attention_heads * arch.kv_channels // layout.tp, "attention channels on a tensor-parallel rank"),
        (ffn, "FFN channels on a tensor-parallel rank"),
    ):
        wanted = f"another for this model: {size} {what} are no multiple of {needs.multiple}"
        require(size % needs.multiple == 0, flag, name, wanted)


def _require_transformer_engine(flag: str, value: str, oldest: str, machine: Machine) -> None:
    found = machine.transformer_engine
    if found is None:
        raise ValueError(
            f"{flag} is {value!r}, but Transformer Engine is not installed: {INSTALL_TRANSFORMER_ENGINE} "
            f"(>= {OLDEST_TRANSFORMER_ENGINE}, on a machine with CUDA), or --transformer-impl local"
        )
    oldest = max(oldest, OLDEST_TRANSFORMER_ENGINE, key=Version)
    try:
        is_new_enough = Version(found).release >= Version(oldest).release  # images carry builds like 2.9.0+70f5366
    except InvalidVersion as error:
        raise ValueError(f"Transformer Engine calls its version {found!r}, which cannot be compared") from error
    if not is_new_enough:
        raise ValueError(
            f"{flag} is {value!r}, but Transformer Engine is {found}, and must be >= {oldest}: "
            f"{INSTALL_TRANSFORMER_ENGINE}"
        )


def _require_apex(machine: Machine) -> None:
    """Apex's version is 0.1 whatever it holds: its extension is asked for."""
    if machine.has_apex_extension:
        return
    found = "is not installed"
    if machine.apex is not None:
        found = f"is {machine.apex}, without it: too old, built without --cuda_ext, or PyPI's project of that name"
    raise ValueError(
        f"--transformer-impl is 'local', which on CUDA needs {APEX_EXTENSION} of NVIDIA's Apex, but Apex {found}: "
        f"{INSTALL_APEX}, or --no-gradient-accumulation-fusion"
    )


def _flag(field: str) -> str:
    return "--no-fp8-wgrad" if field == "fp8_wgrad" else flag_of_field(field)


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _dotted(numbers: tuple[int, int] | None) -> str:
    return "none" if numbers is None else f"{numbers[0]}.{numbers[1]}"
