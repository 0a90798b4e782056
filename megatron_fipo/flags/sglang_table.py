"""SGLang's server options as `--sglang-*`: all of them but those that the run itself decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_fipo.flags.option import VALUE, Option, ValueType
from megatron_fipo.flags.sglang_names import CHOICES, FIELDS_BY_KIND, OTHER_NAMES

PREFIX = "--sglang-"

OWN_FIELDS: Mapping[str, str] = {
    "model_path": "use --hf-checkpoint",
    "tokenizer_path": "the tokenizer is --hf-checkpoint's",
    "load_format": "engines get their weights from the trainer",
    "dtype": "use --bf16: engine and trainer compute in the same precision",
    "device": "use --device",
    "random_seed": "use --seed",
    "context_length": "it follows from --rollout-max-prompt-len and --rollout-max-response-len",
    "tp_size": "use --rollout-num-gpus-per-engine",
    "pp_size": "an engine has one pipeline stage",
    "dp_size": "use --rollout-num-engines",
    "attn_dp_size": "use --rollout-num-engines",
    "base_gpu_id": "engines run on the devices of the ranks that start them",
    "gpu_id_step": "engines run on the devices of the ranks that start them",
    "nnodes": "an engine runs on one node",
    "node_rank": "an engine runs on one node",
    "dist_init_addr": "an engine's address is chosen by the run",
    "nccl_port": "an engine's address is chosen by the run",
    "host": "an engine's address is chosen by the run",
    "port": "an engine's address is chosen by the run",
    "api_key": "engines are private to the run",
    "admin_api_key": "engines are private to the run",
    "skip_tokenizer_init": "engines are given token ids",
    "weight_version": "it counts the trainer's updates",
    "is_embedding": "engines generate",
    "enable_lora": "LoRA is not supported",
    "uno_lora_path": "LoRA is not supported",
    "use_ray": "the run's own ranks start the engines",
}
"""Fields that the run sets itself: field -> what to use instead, or why not."""

_KINDS: Mapping[str, ValueType] = {
    "bool": ValueType("bool"),
    "int": ValueType("int"),
    "ints": ValueType("int", many=True),
    "float": ValueType("float"),
    "floats": ValueType("float", many=True),
    "str": ValueType("str"),
    "strs": ValueType("str", many=True),
    "json": ValueType("json"),
    "size": ValueType("size"),
}


def sglang_options() -> list[Option]:
    """An option for every field of SGLang's ServerArgs that a user may set, under all of SGLang's names for it.

    Every switch also has its negative, `--sglang-no-...`: some are on by default.
    """
    return [_option(name, kind) for name, kind in _kinds_by_field().items() if name not in OWN_FIELDS]


def refused_sglang_flags() -> dict[str, str]:
    """The `--sglang-*` flags of what the run sets itself -> what to use instead."""
    kinds = _kinds_by_field()
    return {flag: OWN_FIELDS[name] for name in OWN_FIELDS for flag in _option(name, kinds[name]).flags}


def _kinds_by_field() -> dict[str, str]:
    return {name: kind for kind, names in FIELDS_BY_KIND.items() for name in names.split()}


def _option(name: str, kind: str) -> Option:
    names = [name.replace("_", "-"), *(other.removeprefix("--") for other in OTHER_NAMES.get(name, "").split())]
    value_type = _KINDS[kind]
    flags: dict[str, Any]
    if value_type.kind == "bool":
        flags = {PREFIX + each: True for each in names} | {f"{PREFIX}no-{each}": False for each in names}
    else:
        flags = {PREFIX + each: VALUE for each in names}
        choices = CHOICES.get(name, "").split()
        if choices:
            allowed = tuple(int(choice) if value_type.kind == "int" else choice for choice in choices)
            value_type = ValueType(value_type.kind, allowed, value_type.many)
    return Option((f"engine.server_args.{name}",), flags, value_type, "engines (SGLang)", listed=False)
