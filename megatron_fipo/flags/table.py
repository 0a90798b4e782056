"""The table of everything the command line accepts, in the order of the help."""

from __future__ import annotations

from megatron_fipo.config import (
    LOSS_SETTINGS,
    BatchSettings,
    CorrectionSettings,
    FIPOSettings,
    RolloutSettings,
)
from megatron_fipo.data_config import DataSettings
from megatron_fipo.flags.megatron_table import megatron_options
from megatron_fipo.flags.option import VALUE, Option, ValueType, options_of, shown_default
from megatron_fipo.flags.presets import PRESETS
from megatron_fipo.flags.sglang_table import sglang_options
from megatron_fipo.megatron_config import MegatronSettings
from megatron_fipo.run_config import EngineSettings, GuardSettings, RunSettings

RUN = "run"
MODEL = "model and parallelism"
OPTIMIZER = "batch and optimizer"
ALGORITHM = "algorithm"
ROLLOUT = "rollout and sampling"
DATA = "data and reward"
ENGINES = "engines (SGLang)"
GUARDS = "guards"
GROUPS = (RUN, MODEL, OPTIMIZER, ALGORITHM, ROLLOUT, DATA, ENGINES, GUARDS)

DEFAULT_ALGORITHM = "fipo"

_OPTIMIZER_FIELDS = frozenset(
    {"lr", "lr_decay_style", "lr_warmup_iters", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps"}
)


def own_options() -> list[Option]:
    """The options of this project's own settings, Megatron's names among them."""
    return [
        *_command_options(),
        *options_of("run", RunSettings, RUN),
        *options_of("batch", BatchSettings, OPTIMIZER),
        *options_of("megatron", MegatronSettings, lambda name: OPTIMIZER if name in _OPTIMIZER_FIELDS else MODEL),
        *options_of("loss", FIPOSettings, ALGORITHM, _loss_defaults()),
        *options_of("correction", CorrectionSettings, ALGORITHM),
        *options_of("rollout", RolloutSettings, ROLLOUT),
        *_checked_options(),
        *options_of("data", DataSettings, DATA),
        *options_of("engine", EngineSettings, ENGINES),
        *options_of("guards", GuardSettings, GUARDS),
    ]


def all_options() -> list[Option]:
    """Every option. Raises ValueError when megatron-core is not installed."""
    return [*own_options(), *megatron_options(), *sglang_options()]


def _command_options() -> list[Option]:
    """Options that are not a field of a settings class."""
    switch = ValueType("bool")
    algorithms = ValueType("str", tuple(LOSS_SETTINGS))
    presets = ValueType("str", tuple(PRESETS))
    return [
        Option(("command.help",), {"--help": True}, switch, RUN, "this text"),
        Option(("command.help_megatron",), {"--help-megatron": True}, switch, RUN, "all of Megatron's flags"),
        Option(("command.help_sglang",), {"--help-sglang": True}, switch, RUN, "all of SGLang's flags"),
        Option(
            ("command.print_config",),
            {"--print-config": True},
            switch,
            RUN,
            "print every setting, its value and where that came from, and stop",
        ),
        Option(
            ("preset",), {"--preset": VALUE}, presets, ALGORITHM, "fill in the paper's settings; explicit flags win"
        ),
        Option(("algorithm",), {"--algorithm": VALUE}, algorithms, ALGORITHM, "the algorithm", DEFAULT_ALGORITHM),
    ]


def _checked_options() -> list[Option]:
    """Megatron-LM's names for what follows from other settings: they are only compared. And its second names."""
    integer = ValueType("int")
    return [
        Option(
            ("run.save_interval",),
            {"--persistent-save-interval": VALUE},
            integer,
            RUN,
            "--save-interval",
            listed=False,
        ),
        Option(
            ("check.exit_on_missing_checkpoint",),
            {"--exit-on-missing-checkpoint": True},
            ValueType("bool"),
            RUN,
            "--load must hold a checkpoint even where it is the directory of --save",
            listed=False,
        ),
        Option(
            ("check.global_batch_size",),
            {"--global-batch-size": VALUE},
            integer,
            OPTIMIZER,
            "samples per update; follows from the batch's sizes, only checked",
        ),
        Option(
            ("check.seq_length",),
            {"--seq-length": VALUE},
            integer,
            ROLLOUT,
            "prompt and response together; only checked against the two limits",
        ),
    ]


def _loss_defaults() -> dict[str, str]:
    """Each loss setting's default, and GRPO's where that is another."""
    defaults = {}
    for name in FIPOSettings.__dataclass_fields__:
        default = getattr(LOSS_SETTINGS["fipo"], name)
        grpo = getattr(LOSS_SETTINGS["grpo"], name, default)
        defaults[name] = shown_default(default) + (f"; grpo {'none' if grpo is None else grpo}" * (grpo != default))
    return defaults
