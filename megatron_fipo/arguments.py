"""The command line becomes Settings, once: nothing else sees a flag.

Megatron's and SGLang's flags come from tables, so nothing heavy is imported here.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar, cast

from megatron_fipo.config import (
    LOSS_SETTINGS,
    Algorithm,
    BatchSettings,
    CorrectionSettings,
    FIPOSettings,
    PPOSettings,
    RolloutSettings,
    require,
)
from megatron_fipo.data_config import DataSettings
from megatron_fipo.flags.command_line import Given, read_arguments
from megatron_fipo.flags.megatron_meaning import pretraining_notes, settled
from megatron_fipo.flags.megatron_table import contradictions
from megatron_fipo.flags.presets import PRESETS
from megatron_fipo.flags.render import help_text, megatron_help_text, sglang_help_text
from megatron_fipo.flags.table import DEFAULT_ALGORITHM, all_options
from megatron_fipo.megatron_config import MegatronSettings
from megatron_fipo.run_config import EngineSettings, GuardSettings, RunSettings

if TYPE_CHECKING:
    from megatron_fipo.weights.architecture import Architecture

P = ParamSpec("P")
S = TypeVar("S")

_PREFIX_OF_MAPPINGS = {
    "megatron": ("model", "transformer", "optimizer", "ddp"),
    "engine": ("server_args",),
}
"""Settings that are mappings of another program's names: section -> fields."""

_ONLY_WITH = (
    ("data.input_key", "data.prompt_data", "--prompt-data"),
    ("data.label_key", "data.prompt_data", "--prompt-data"),
    ("data.rollout_shuffle", "data.prompt_data", "--prompt-data"),
    ("data.num_eval_problems", "data.task", "--task"),
    ("data.deduplicate", "data.prompt_data", "--prompt-data"),
    ("data.dedup_key", "data.prompt_data", "--prompt-data"),
    ("correction.tis_clip", "correction.use_tis", "--use-tis"),
    ("correction.tis_clip_low", "correction.use_tis", "--use-tis"),
    ("correction.icepop_low", "correction.use_icepop", "--use-icepop"),
    ("correction.icepop_high", "correction.use_icepop", "--use-icepop"),
    ("rollout.partial_rollout_older_tokens", "rollout.partial_rollout_len", "--partial-rollout-len"),
)
"""Settings whose flag says nothing without another one: setting, what it needs, that one's flag."""


@dataclass(frozen=True)
class Settings:
    """Everything a run is told, checked as a whole.

    In `rollout`, what depends on the algorithm is resolved: `dynamic_sampling` and `overlong_penalty` are bools and
    `over_sampling_batch_size` is a number. `provenance` says of every setting ("loss.half_life") whether it is a
    "default", from a "preset" or from a "flag". `notes` are sentences for the user about flags without effect.
    """

    algorithm: Algorithm
    loss: PPOSettings  # FIPOSettings for fipo
    correction: CorrectionSettings
    batch: BatchSettings
    rollout: RolloutSettings
    data: DataSettings
    run: RunSettings
    engine: EngineSettings
    guards: GuardSettings
    megatron: MegatronSettings
    provenance: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.rollout.dynamic_sampling is not None
        assert self.rollout.overlong_penalty is not None
        assert self.rollout.over_sampling_batch_size is not None
        assert (self.algorithm == "fipo") == isinstance(self.loss, FIPOSettings)
        require(
            self.algorithm != "fipo" or self.batch.num_updates_per_rollout >= 2,
            "--num-updates-per-rollout",
            self.batch.num_updates_per_rollout,
            ">= 2 with --algorithm fipo: in the first update after a rollout the policy is still the old one, every "
            "influence weight is 1, and FIPO would be switched off (the paper makes 8)",
        )
        require(
            self.rollout.partial_rollout_len is None
            or self.rollout.over_sampling_batch_size > self.batch.rollout_batch_size,
            "--over-sampling-batch-size",
            self.rollout.over_sampling_batch_size,
            f"> --rollout-batch-size ({self.batch.rollout_batch_size}) with --partial-rollout-len: a batch that needs "
            "every group it works on leaves no response to the next step",
        )
        require(
            self.rollout.partial_rollout_older_tokens == "mask"
            or self.correction.use_tis
            or self.correction.use_icepop,
            "--partial-rollout-older-tokens",
            self.rollout.partial_rollout_older_tokens,
            "mask, or used with --use-tis or --use-icepop, which do the correcting",
        )
        require(
            not self.rollout.overlong_penalty
            or self.rollout.overlong_buffer_len <= self.rollout.rollout_max_response_len,
            "--overlong-buffer-len",
            self.rollout.overlong_buffer_len,
            f"<= --rollout-max-response-len ({self.rollout.rollout_max_response_len}), or give --no-overlong-penalty",
        )
        longest = self.rollout.rollout_max_prompt_len + self.rollout.rollout_max_response_len
        require(
            self.batch.max_tokens_per_micro_batch * self.megatron.context_parallel_size >= longest,
            "--max-tokens-per-micro-batch",
            self.batch.max_tokens_per_micro_batch,
            f">= --rollout-max-prompt-len + --rollout-max-response-len ({longest}), divided by --context-parallel-size "
            f"({self.megatron.context_parallel_size})",
        )

    @property
    def eval_max_response_len(self) -> int:
        """The longest response of evaluation, tokens."""
        return self.data.eval_max_response_len or self.rollout.rollout_max_response_len


class Collected:
    """The errors of several checks, each once, in their order."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def of(self, check: Callable[P, S], *arguments: P.args, **named: P.kwargs) -> S | None:
        """What `check` returns; None when it raised ValueError, which is kept."""
        try:
            return check(*arguments, **named)
        except ValueError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def raise_them(self) -> None:
        """Raise ValueError with all of them in one line, if there are any."""
        if self.problems:
            raise ValueError("; ".join(self.problems))


Preview = Callable[["Settings"], tuple[tuple[str, ...], tuple[str, ...]]]
"""What a start would refuse, and what it would note; megatron_fipo.preview has it."""


def parse_arguments(argv: Sequence[str] | None = None, preview: Preview | None = None) -> Settings:
    """The settings that a command line asks for (default: this process's own arguments).

    Raises ValueError with one line for the user: the flag, the value found, the value wanted. `--help`,
    `--help-megatron`, `--help-sglang` and `--print-config` print, on the first rank only, and raise SystemExit(0);
    `--print-config` raises ValueError, after that, for all that a start would refuse, as `preview` finds it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options = all_options()
    texts = {
        "-h": help_text,
        "--help": help_text,
        "--help-megatron": megatron_help_text,
        "--help-sglang": sglang_help_text,
    }
    for word in words:
        if word in texts:
            _print_and_stop(texts[word](options))
    given, notes = read_arguments(words, options)
    settings = settings_from(given, notes)
    if "command.print_config" in given:  # also of settings that lack the model or the data
        _print_checked(settings, preview)
    model, data = settings.run.hf_checkpoint, settings.data
    require(bool(model), "--hf-checkpoint", model, "the directory of a Hugging Face model")
    has_prompts = data.task is not None or data.prompt_data is not None
    require(has_prompts, "--task", data.task, "given, or --prompt-data with a file of prompts")
    return settings


def architecture_differences(megatron: MegatronSettings, arch: Architecture) -> list[str]:
    """One line for every flag that contradicts the checkpoint's architecture."""
    from megatron_fipo.weights.architecture import to_gpt_model_fields, to_transformer_fields

    derived = {
        **to_transformer_fields(arch),
        **to_gpt_model_fields(arch),
        "vocab_size": arch.vocab_size,
        "group_query_attention": arch.num_query_groups != arch.num_attention_heads,
    }
    return contradictions({**megatron.transformer, **megatron.model}, derived)


def _print_checked(settings: Settings, preview: Preview | None) -> NoReturn:
    """Print the settings and what a start would say of them. Raises ValueError for what it would refuse."""
    problems, notes = preview(settings) if preview is not None else ((), ())
    if _is_first_rank():
        print(config_text(dataclasses.replace(settings, notes=(*settings.notes, *notes))), flush=True)
    if problems:
        raise ValueError("; ".join(problems))
    raise SystemExit(0)


def settings_from(given: Mapping[str, Given], notes: Sequence[str] = ()) -> Settings:
    """Defaults, then the preset, then what was given; checked and resolved. Raises ValueError like parse_arguments, for
    all that is wrong by itself or with the rest."""
    preset = PRESETS[given["preset"].value] if "preset" in given else {}
    explicit, meant = settled({s: entry.value for entry in given.values() for s in entry.option.settings})
    values: dict[str, Any] = {**_fitted(preset, explicit), **explicit}
    algorithm = values.get("algorithm", DEFAULT_ALGORITHM)
    found = Collected()
    found.of(_check_algorithm, algorithm, preset, given)
    sections: dict[str, Any] = {name: found.of(_section, kind, name, values) for name, kind in _SECTION_CLASSES.items()}
    loss_fields = {field.name for field in dataclasses.fields(LOSS_SETTINGS[algorithm])}
    loss_values = {name: values[f"loss.{name}"] for name in loss_fields if f"loss.{name}" in values}
    sections["loss"] = found.of(dataclasses.replace, LOSS_SETTINGS[algorithm], **loss_values)
    batch, rollout = sections["batch"], sections["rollout"]
    if batch is not None and rollout is not None:
        _check_given(given, values, algorithm, batch, rollout, found)
        if not _default_on(rollout.dynamic_sampling, algorithm) and rollout.partial_rollout_len is None:
            values.pop("rollout.over_sampling_batch_size", None)  # a preset's, which then says nothing
        sections["rollout"] = _resolved(rollout, batch, algorithm)
    if None in sections.values():
        found.raise_them()
    origin = {setting: "flag" if setting in explicit else "preset" for setting in values}
    provenance = {setting: origin.get(setting, "default") for setting, _ in _flat(algorithm, sections)}
    odd = pretraining_notes(sections["run"], sections["batch"], sections["megatron"])
    said = (*notes, *meant, *odd, *_evaluation_notes(sections["data"]))
    settings = found.of(Settings, algorithm=cast(Algorithm, algorithm), **sections, provenance=provenance, notes=said)
    found.raise_them()
    assert settings is not None
    return settings


def _evaluation_notes(data: DataSettings) -> list[str]:
    """What greedy evaluation makes of settings that are for sampling."""
    if data.eval_temperature > 0 or data.n_samples_per_eval_prompt == 1:
        return []
    return [
        f"--n-samples-per-eval-prompt {data.n_samples_per_eval_prompt} draws the same response as often: "
        "--eval-temperature is 0 (greedy)"
    ]


def config_text(settings: Settings) -> str:
    """Every setting, its value and where that came from, one per line."""
    sections = {name: getattr(settings, name) for name in _SECTIONS}
    rows = [(setting, _shown(value)) for setting, value in _flat(settings.algorithm, sections)]
    name_width = max(len(setting) for setting, _ in rows)
    value_width = max(len(value) for _, value in rows)
    lines = [f"{name:{name_width}}  {value:{value_width}}  {settings.provenance[name]}" for name, value in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in settings.notes)])


def config_values(settings: Settings) -> dict[str, Any]:
    """Every setting ("loss.half_life") and its value."""
    return dict(_flat(settings.algorithm, {name: getattr(settings, name) for name in _SECTIONS}))


_SECTIONS = ("run", "megatron", "batch", "loss", "correction", "rollout", "data", "engine", "guards")
_SECTION_CLASSES: Mapping[str, type] = {
    "run": RunSettings,
    "megatron": MegatronSettings,
    "batch": BatchSettings,
    "correction": CorrectionSettings,
    "rollout": RolloutSettings,
    "data": DataSettings,
    "engine": EngineSettings,
    "guards": GuardSettings,
}  # the loss's depends on the algorithm


def _section(settings_class: type[S], section: str, values: Mapping[str, Any]) -> S:
    """One settings class from the values that belong to it, mappings included."""
    arguments: dict[str, Any] = {name: {} for name in _PREFIX_OF_MAPPINGS.get(section, ())}
    for setting, value in values.items():
        first, _, rest = setting.partition(".")
        if first != section:
            continue
        name, _, key = rest.partition(".")
        if key:
            arguments[name][key] = value
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    return settings_class(**arguments)


def _resolved(rollout: RolloutSettings, batch: BatchSettings, algorithm: str) -> RolloutSettings:
    """The rollout's settings with the algorithm's own defaults filled in."""
    dynamic = _default_on(rollout.dynamic_sampling, algorithm)
    fills = dynamic or rollout.partial_rollout_len is not None  # generation batch by generation batch
    return dataclasses.replace(
        rollout,
        dynamic_sampling=dynamic,
        overlong_penalty=_default_on(rollout.overlong_penalty, algorithm),
        over_sampling_batch_size=(rollout.over_sampling_batch_size if fills else None) or batch.rollout_batch_size,
    )


def _default_on(value: bool | None, algorithm: str) -> bool:
    """What is on for DAPO and FIPO and off for GRPO, unless it is said."""
    return algorithm != "grpo" if value is None else value


def _fitted(preset: Mapping[str, Any], explicit: Mapping[str, Any]) -> Mapping[str, Any]:
    """The preset for a rollout batch of the size given: its generation batch stays the same multiple of that."""
    generated, trained = "rollout.over_sampling_batch_size", "batch.rollout_batch_size"
    if not preset or trained not in explicit:
        return preset
    return {**preset, generated: preset[generated] // preset[trained] * explicit[trained]}


def _check_algorithm(algorithm: str, preset: Mapping[str, Any], given: Mapping[str, Given]) -> None:
    """FIPO's flags need FIPO, and a preset its own algorithm."""
    if preset and preset["algorithm"] != algorithm:
        raise ValueError(
            f"--algorithm is {algorithm!r}, but --preset {given['preset'].value} is made for {preset['algorithm']}"
        )
    known = {f"loss.{field.name}" for field in dataclasses.fields(LOSS_SETTINGS[algorithm])}
    for setting, entry in given.items():
        if setting.startswith("loss.") and setting not in known:
            raise ValueError(f"{entry.flag} is given, but --algorithm is {algorithm!r}: it belongs to fipo")


def _check_given(
    given: Mapping[str, Given],
    values: Mapping[str, Any],
    algorithm: str,
    batch: BatchSettings,
    rollout: RolloutSettings,
    found: Collected,
) -> None:
    """What was said must agree with the rest of it, and must have an effect."""
    if "check.global_batch_size" in given:
        prompts = f"--rollout-batch-size ({batch.rollout_batch_size})"
        samples = f"x --n-samples-per-prompt ({batch.n_samples_per_prompt})"
        updates = f"/ --num-updates-per-rollout ({batch.num_updates_per_rollout})"
        value = given["check.global_batch_size"].value
        wanted = f"{batch.global_batch_size} = {prompts} {samples} {updates}"
        found.of(require, value == batch.global_batch_size, "--global-batch-size", value, wanted)
    longest = rollout.rollout_max_prompt_len + rollout.rollout_max_response_len
    wanted = (
        f">= --rollout-max-prompt-len ({rollout.rollout_max_prompt_len}) + --rollout-max-response-len "
        f"({rollout.rollout_max_response_len}) = {longest}"
    )
    for setting in ("check.seq_length", "megatron.model.max_sequence_length"):
        if setting in given:
            value = given[setting].value
            found.of(require, value >= longest, given[setting].flag, value, wanted)
    fills = rollout.dynamic_sampling if rollout.partial_rollout_len is None else True
    for setting, switch, flag in (
        ("rollout.over_sampling_batch_size", fills, "--dynamic-sampling"),
        ("rollout.max_generation_batches", fills, "--dynamic-sampling"),
        ("rollout.overlong_buffer_len", rollout.overlong_penalty, "--overlong-penalty"),
        ("rollout.overlong_penalty_factor", rollout.overlong_penalty, "--overlong-penalty"),
    ):
        if setting in given and not _default_on(switch, algorithm):
            why = "--no-" + flag.removeprefix("--") if switch is False else f"--algorithm {algorithm} without {flag}"
            found.problems.append(f"{given[setting].flag} is given, but has no effect with {why}")
    for setting, needed, flag in _ONLY_WITH:
        if setting in given and not values.get(needed):
            found.problems.append(f"{given[setting].flag} is given, but has no effect without {flag}")


def _flat(algorithm: str, sections: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Every setting with its value, as dotted paths; entries of the mappings one by one."""
    rows: list[tuple[str, Any]] = [("algorithm", algorithm)]
    for section in _SECTIONS:
        for field in dataclasses.fields(sections[section]):
            value = getattr(sections[section], field.name)
            if field.name in _PREFIX_OF_MAPPINGS.get(section, ()):
                rows += [(f"{section}.{field.name}.{key}", entry) for key, entry in sorted(value.items())]
            else:
                rows.append((f"{section}.{field.name}", value))
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print_and_stop(text: str) -> NoReturn:
    """Print on the first rank of torchrun or Slurm, or when there is but one process; then stop."""
    if _is_first_rank():
        print(text)
    raise SystemExit(0)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
