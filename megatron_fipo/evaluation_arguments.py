"""The command line of tools/evaluate.py: the training program's own flags where an evaluation takes them too."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fipo.config import RolloutSettings, require
from megatron_fipo.data_config import DataSettings
from megatron_fipo.flags.command_line import Given, read_arguments
from megatron_fipo.flags.option import VALUE, Option, ValueType
from megatron_fipo.flags.sglang_table import sglang_options
from megatron_fipo.flags.table import own_options
from megatron_fipo.run_config import EngineSettings, RunSettings

NUM_RESPONSES_PER_BLOCK = 512
TAKEN = {
    "run": ("hf_checkpoint", "load", "output_dir", "seed"),
    "megatron": ("bf16", "device", "transformer_impl"),
    "rollout": ("rollout_max_prompt_len",),
    "command": ("help", "help_sglang"),
}
"""The program's own settings that an evaluation takes too; of `data` and `engine` all but these:"""
LEFT_OUT = (
    *("data.prompt_data", "data.rollout_shuffle"),
    # of taking turns with a trainer and being sent its weights, which bring engines in FP8 to life
    *("engine.placement", "engine.weight_bucket_mb", "engine.check_weights_interval", "engine.fp8_weights"),
    "engine.offload_trainer",
)
OTHER_WORDS = {
    "run.load": "directory of a run's checkpoints: evaluate the newest (default: --hf-checkpoint's own weights)",
    "run.output_dir": "directory of the responses and results; one that a killed evaluation left is gone on with",
    "run.seed": "seed of sampling",
    "megatron.bf16": "let the engines compute in bf16 (default: in the checkpoint's own precision)",
    "megatron.device": "where the engines run; auto: CUDA when there is any",
    "megatron.transformer_impl": "of --load: the layers that the run trained with",
    "data.eval_prompt_data": "problems: JSONL or parquet files, or directories of Hugging Face datasets saved to disk; "
    "as NAME=PATH, and the name stands in the results",
    "data.eval_max_response_len": "longest response, tokens",
    "data.on_long_prompt": "a prompt longer than --rollout-max-prompt-len: stop, or cut off its beginning; skip is "
    "refused, problems are never left out",
    "data.on_reward_error": "a grader that gives no verdict: stop, or count that response as not right, and say so",
    "engine.num_engines": "engines to start (default: as many as fit on the GPUs)",
}
OTHER_DEFAULTS = {
    "run.output_dir": "",  # each evaluation has its own
    "data.eval_max_response_len": str(RolloutSettings.rollout_max_response_len),
}
ONLY_FOR_FILES = ("input_key", "label_key", "deduplicate", "dedup_key")
ONLY_FOR_TASKS = ("task_args", "num_eval_problems")


@dataclass(frozen=True)
class EvaluationRequest:
    """What the command line asks for, checked."""

    run: RunSettings
    data: DataSettings
    engine: EngineSettings
    max_prompt_len: int
    max_response_len: int
    bf16: bool
    device: str
    transformer_impl: str | None
    block_size: int
    notes: tuple[str, ...]


def evaluation_options() -> list[Option]:
    """The flags: the program's where it has them."""
    chosen = []
    for option in [*own_options(), *sglang_options()]:
        setting = option.setting
        section, _, name = setting.partition(".")
        if setting not in LEFT_OUT and (section in ("data", "engine") or name in TAKEN.get(section, ())):
            meaning = OTHER_WORDS.get(setting, option.help)
            default = OTHER_DEFAULTS.get(setting, option.default)
            chosen.append(dataclasses.replace(option, help=meaning, default=default))
    block_size = "problems answered together; a kill loses at most one such block (default: as many as make about "
    return [
        *chosen,
        Option(
            ("evaluation.block_size",),
            {"--eval-block-size": VALUE},
            ValueType("int"),
            "evaluation",
            f"{block_size}{NUM_RESPONSES_PER_BLOCK} responses)",
        ),
    ]


def evaluation_help_text() -> str:
    """All flags but SGLang's."""
    lines = [
        "usage: python tools/evaluate.py --hf-checkpoint DIR [--load DIR] (--eval-prompt-data NAME=FILE ... --rm-type "
        "NAME | --task NAME) --output-dir DIR [...]",
        "",
    ]
    for option in evaluation_options():
        if option.listed:
            text = option.help + (f" (default: {option.default})" if option.default else "")
            if option.type.choices:
                text += f" [{', '.join(str(choice) for choice in option.type.choices)}]"
            lines.append(f"  {', '.join(option.flags)}")
            lines += textwrap.wrap(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join([*lines, "", "Every option of SGLang's server is --sglang-<its name>; --help-sglang lists them."])


def parse_evaluation(words: Sequence[str]) -> EvaluationRequest:
    """Raises ValueError with one line that names the flag, the value found and the value wanted."""
    given, notes = read_arguments(words, evaluation_options())
    values = {setting: entry.value for setting, entry in given.items()}
    data_values = _section("data", values)
    has_task, files = "task" in data_values, tuple(data_values.get("eval_prompt_data", ()))
    if has_task == bool(files):
        raise ValueError(
            "what to evaluate on is given by --eval-prompt-data NAME=FILE ... or by --task NAME, and by one of them"
        )
    _refuse_without_effect(given, has_task)
    for setting, flag in (("run.hf_checkpoint", "--hf-checkpoint"), ("run.output_dir", "--output-dir")):
        require(bool(values.get(setting)), flag, values.get(setting), "the path of a directory")
    data = DataSettings(**{**data_values, "eval_prompt_data": files})
    require(
        data.on_long_prompt != "skip",
        "--on-long-prompt",
        data.on_long_prompt,
        "error or truncate-left: evaluation problems are never left out",
    )
    engine_values = _section("engine", values)
    server_args = _section("server_args", engine_values)
    own_values = {name: value for name, value in engine_values.items() if not name.startswith("server_args.")}
    block_size = values.get("evaluation.block_size", max(1, NUM_RESPONSES_PER_BLOCK // data.n_samples_per_eval_prompt))
    require(block_size >= 1, "--eval-block-size", block_size, ">= 1")
    max_prompt_len = values.get("rollout.rollout_max_prompt_len", RolloutSettings.rollout_max_prompt_len)
    require(max_prompt_len >= 1, "--rollout-max-prompt-len", max_prompt_len, ">= 1")
    return EvaluationRequest(
        run=RunSettings(**_section("run", values)),
        data=data,
        engine=EngineSettings(**own_values, server_args=server_args),
        max_prompt_len=max_prompt_len,
        max_response_len=data.eval_max_response_len or RolloutSettings.rollout_max_response_len,
        bf16=values.get("megatron.bf16", False),
        device=values.get("megatron.device", "auto"),
        transformer_impl=values.get("megatron.transformer_impl"),
        block_size=block_size,
        notes=tuple(notes),
    )


def _refuse_without_effect(given: Mapping[str, Given], has_task: bool) -> None:
    names, needed = (ONLY_FOR_FILES, "--eval-prompt-data") if has_task else (ONLY_FOR_TASKS, "--task")
    for name in names:
        if f"data.{name}" in given:
            raise ValueError(f"{given[f'data.{name}'].flag} is given, but has no effect without {needed}")


def _section(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one settings class."""
    prefix = f"{section}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
