"""The command line: what it accepts, what it refuses and in which words, and the settings that come out."""

import dataclasses
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.arguments import parse_arguments
from megatron_fipo.config import FIPOSettings, PPOSettings
from megatron_fipo.flags.presets import PRESETS
from megatron_fipo.flags.render import help_text, is_sglang_field, megatron_help_text
from megatron_fipo.flags.table import all_options, own_options

BASE = ["--hf-checkpoint", "model", "--task", "chain_sum"]
FLAGS_FILE = Path(__file__).with_name("flags.txt")


def parse(*flags):
    return parse_arguments([*BASE, *flags])


def test_defaults_are_the_dataclasses_own():
    settings = parse()
    assert settings.algorithm == "fipo"
    assert settings.loss == FIPOSettings()
    assert settings.batch.global_batch_size == 1024
    assert (settings.megatron.lr, settings.megatron.lr_warmup_iters, settings.megatron.weight_decay) == (1e-6, 10, 0.1)
    assert (settings.megatron.clip_grad, settings.megatron.adam_beta1, settings.megatron.adam_beta2) == (1, 0.9, 0.999)
    assert settings.megatron.adam_eps == 1e-8
    assert settings.megatron.bf16 is False
    assert settings.notes == ()
    assert settings.provenance["run.hf_checkpoint"] == "flag"
    assert set(settings.provenance.values()) == {"default", "flag"}


def test_settings_are_frozen_and_plain():
    settings = parse("--sglang-mem-fraction-static", "0.3", "--num-layers", "12")
    for section in (settings, settings.batch, settings.megatron, settings.loss):
        name = dataclasses.fields(section)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, name, None)
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_explicit_flags_reach_their_settings():
    settings = parse(
        "--bf16",
        "--lr=3e-6",
        "--train-iters",
        "7",
        "--fipo-half-life",
        "8",
        "--task-args",
        '{"min_terms": 2}',
        "--rollout-num-engines",
        "2",
        "--apply-chat-template",
    )
    assert settings.megatron.bf16 is True
    assert settings.megatron.optimizer_fields["lr"] == 3e-6
    assert settings.run.train_iters == 7
    assert settings.loss.half_life == 8.0
    assert settings.data.task_args == {"min_terms": 2}
    assert settings.engine.num_engines == 2
    assert settings.data.apply_chat_template is True
    assert settings.provenance["loss.half_life"] == "flag"
    assert settings.provenance["loss.influence_low"] == "default"


@pytest.mark.parametrize(
    ("algorithm", "loss", "is_on"),
    [
        ("grpo", PPOSettings(0.2, 0.2, None, "seq-mean-token-mean"), False),
        ("dapo", PPOSettings(0.2, 0.28, 10.0, "token-mean"), True),
        ("fipo", FIPOSettings(0.2, 0.28, 10.0, "token-mean"), True),
    ],
)
def test_the_algorithm_decides_loss_dynamic_sampling_and_overlong_penalty(algorithm, loss, is_on):
    settings = parse("--algorithm", algorithm)
    assert settings.loss == loss
    assert settings.rollout.dynamic_sampling is is_on
    assert settings.rollout.overlong_penalty is is_on
    assert settings.rollout.over_sampling_batch_size == 512


def test_tri_state_switches_override_the_algorithm():
    settings = parse("--algorithm", "grpo", "--dynamic-sampling", "--overlong-penalty")
    assert settings.rollout.dynamic_sampling is True
    assert settings.rollout.overlong_penalty is True
    settings = parse("--no-dynamic-sampling", "--no-overlong-penalty", "--rollout-max-response-len", "8")
    assert settings.rollout.dynamic_sampling is False
    assert settings.rollout.overlong_penalty is False


def test_dual_clip_takes_none():
    assert parse("--algorithm", "dapo", "--dual-clip", "none").loss.dual_clip is None


def test_the_last_of_equal_flags_wins():
    assert parse("--seed", "1", "--seed", "2").run.seed == 2


ERRORS = {
    "unknown flag": (["--rollout-batch", "3"], ["unknown flag --rollout-batch", "did you mean --rollout-batch-size?"]),
    "underscores": (["--fipo_half_life", "3"], ["did you mean --fipo-half-life?"]),
    "two unknown flags": (["--qqq", "1", "--zzz"], ["unknown flag --qqq", "unknown flag --zzz"]),
    "abbreviation": (["--algo", "fipo"], ["unknown flag --algo", "--algorithm"]),
    "stray word": (["--bf16", "yes"], ["--bf16 takes no value", "'yes'"]),
    "two values": (["--seed", "1", "2"], ["--seed takes one value", "'1 2'"]),
    "no value": (["--lr", "--bf16"], ["--lr is given without a value"]),
    "integer": (["--train-iters", "1e3"], ["--train-iters is '1e3'", "an integer"]),
    "number": (["--lr", "fast"], ["--lr is 'fast'", "a number"]),
    "not a number": (["--lr", "nan"], ["--lr is 'nan'", "a number"]),
    "infinity": (["--rollout-temperature", "inf"], ["--rollout-temperature is 'inf'", "finite"]),
    "infinite size": (["--sglang-max-total-tokens", "1e308T"], ["--sglang-max-total-tokens is '1e308T'", "whole"]),
    "negative number": (["--lr", "-1"], ["--lr is -1.0", "in [0, 1)"]),
    "choice": (["--loss-agg", "mean"], ["--loss-agg is 'mean'", "token-mean, seq-mean-token-sum"]),
    "algorithm": (["--algorithm", "ppo"], ["--algorithm is 'ppo'", "grpo, dapo, fipo"]),
    "preset": (["--preset", "fipo"], ["--preset is 'fipo'", "fipo-qwen2.5-32b"]),
    "json": (["--task-args", "{x"], ["--task-args is '{x'", "JSON"]),
    "json object": (["--task-args", "[1]"], ["--task-args is '[1]'", "JSON object"]),
    "range": (["--clip-low", "1.5"], ["--clip-low is 1.5", "between 0 and 1"]),
    "steps": (["--train-iters", "0"], ["--train-iters is 0", ">= 1"]),
    "fipo flag for grpo": (
        ["--algorithm", "grpo", "--fipo-half-life", "8"],
        ["--fipo-half-life", "--algorithm", "grpo"],
    ),
    "fipo with one update": (
        ["--num-updates-per-rollout", "1"],
        ["--num-updates-per-rollout is 1", "--algorithm fipo", "influence weight is 1"],
    ),
    "fipo with equal bounds": (
        ["--fipo-influence-high", "1"],
        ["--fipo-influence-high is 1.0", "--fipo-influence-low (1.0)", "switch FIPO off"],
    ),
    "fipo without dual clip": (["--dual-clip", "none"], ["--dual-clip is None", "FIPO"]),
    "opposite switches": (["--dynamic-sampling", "--no-dynamic-sampling"], ["--dynamic-sampling and --no-dynamic"]),
    "updates do not divide": (
        ["--num-updates-per-rollout", "3"],
        ["--num-updates-per-rollout is 3", "--rollout-batch-size (512)"],
    ),
    "global batch size": (
        ["--global-batch-size", "512"],
        ["--global-batch-size is 512", "1024", "--rollout-batch-size", "--n-samples-per-prompt", "--num-updates"],
    ),
    "sequence length": (
        ["--seq-length", "4096"],
        ["--seq-length is 4096", "--rollout-max-prompt-len (2048)", "--rollout-max-response-len (20480)", "22528"],
    ),
    "token budget": (
        ["--max-tokens-per-micro-batch", "1024"],
        ["--max-tokens-per-micro-batch is 1024", "--rollout-max-prompt-len + --rollout-max-response-len (22528)"],
    ),
    "overlong buffer": (
        ["--rollout-max-response-len", "100"],
        ["--overlong-buffer-len is 4096", "--rollout-max-response-len (100)", "--no-overlong-penalty"],
    ),
    "buffer without penalty": (
        ["--no-overlong-penalty", "--overlong-buffer-len", "8"],
        ["--overlong-buffer-len", "no effect", "--no-overlong-penalty"],
    ),
    "grpo's buffer": (
        ["--algorithm", "grpo", "--overlong-buffer-len", "8"],
        ["--overlong-buffer-len", "no effect", "--algorithm grpo without --overlong-penalty"],
    ),
    "over-sampling without dynamic sampling": (
        ["--no-dynamic-sampling", "--over-sampling-batch-size", "600"],
        ["--over-sampling-batch-size", "--no-dynamic-sampling"],
    ),
    "column of a file that is not there": (["--input-key", "text"], ["--input-key", "--prompt-data"]),
    "task and file": (["--prompt-data", "x.jsonl"], ["--task is 'chain_sum'", "--prompt-data (x.jsonl)"]),
    "evaluation file of a task": (["--eval-prompt-data", "x"], ["--eval-prompt-data is 'x'", "--prompt-data"]),
    "two rewards": (
        ["--rm-type", "math", "--custom-rm-path", "a:b"],
        ["--rm-type is 'math'", "--custom-rm-path (a:b)"],
    ),
    "record and replay": (
        ["--record-rollouts", "a", "--replay-rollouts", "b"],
        ["--replay-rollouts is 'b'", "--record-rollouts (a)"],
    ),
    "kept checkpoints without save": (["--keep-last-checkpoints", "5"], ["--keep-last-checkpoints is 5", "--save"]),
    "two wrong values": (["--lr", "x", "--seed", "y", "--qqq"], ["--lr is 'x'", "--seed is 'y'", "unknown flag --qqq"]),
    "shorter context than the run's": (
        ["--max-position-embeddings", "4096"],
        ["--max-position-embeddings is 4096", "--rollout-max-response-len (20480) = 22528"],
    ),
    "preset of another algorithm": (
        ["--preset", "fipo-qwen2.5-32b", "--algorithm", "dapo"],
        ["--algorithm is 'dapo'", "--preset fipo-qwen2.5-32b"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_wrong_command_line_is_one_clear_line(case):
    flags, fragments = ERRORS[case]
    with pytest.raises(ValueError) as raised:
        parse(*flags)
    message = str(raised.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--task", "chain_sum"], ["--hf-checkpoint is ''", "directory"]),
        (["--hf-checkpoint", "model"], ["--task is None", "--prompt-data"]),
        (["train", *BASE], ["unexpected argument 'train'"]),
        (["-x", *BASE], ["unexpected argument '-x'"]),
    ],
)
def test_what_every_run_needs_is_asked_for(argv, fragments):
    with pytest.raises(ValueError) as raised:
        parse_arguments(argv)
    for fragment in fragments:
        assert fragment in str(raised.value)


def test_one_update_is_fine_where_fipo_is_not_asked_for():
    assert parse("--algorithm", "grpo", "--num-updates-per-rollout", "1").batch.global_batch_size == 8192


def test_sizes_that_agree_are_accepted():
    settings = parse("--global-batch-size", "1024", "--seq-length", "22528")
    assert settings.batch.global_batch_size == 1024


def test_context_parallelism_stretches_the_token_budget():
    flags = ["--max-tokens-per-micro-batch", "12000"]
    assert parse(*flags, "--context-parallel-size", "2").batch.max_tokens_per_micro_batch == 12000
    with pytest.raises(ValueError, match="--max-tokens-per-micro-batch"):
        parse(*flags)


def test_micro_batch_size_is_accepted_with_a_note():
    (note,) = parse("--micro-batch-size", "4").notes
    assert note.startswith("--micro-batch-size 4 has no effect")
    assert "--max-tokens-per-micro-batch" in note


def test_many_greedy_responses_to_an_evaluation_prompt_are_worth_a_note():
    (note,) = parse("--n-samples-per-eval-prompt", "32").notes
    assert "--n-samples-per-eval-prompt 32" in note
    assert "--eval-temperature is 0" in note
    assert parse("--n-samples-per-eval-prompt", "32", "--eval-temperature", "0.6").notes == parse().notes == ()


def test_explicit_flags_win_over_the_preset_whatever_the_order():
    for flags in (
        ["--preset", "fipo-qwen2.5-math-7b", "--lr", "2e-6"],
        ["--lr", "2e-6", "--preset", "fipo-qwen2.5-math-7b"],
    ):
        settings = parse(*flags)
        assert settings.megatron.lr == 2e-6
        assert settings.loss.safety_threshold == 3.0
        assert settings.provenance["megatron.lr"] == "flag"
        assert settings.provenance["loss.safety_threshold"] == "preset"
        assert settings.provenance["run.seed"] == "default"


def test_switching_dynamic_sampling_off_drops_the_presets_generation_batch():
    settings = parse("--preset", "fipo-qwen2.5-32b", "--no-dynamic-sampling")
    assert settings.rollout.over_sampling_batch_size == 512
    assert settings.provenance["rollout.over_sampling_batch_size"] == "default"


def test_every_setting_of_a_preset_exists():
    known = {option.setting for option in own_options()}
    for preset in PRESETS.values():
        assert set(preset) <= known


def test_print_config_shows_a_preset_without_model_and_data(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--preset", "fipo-qwen2.5-32b", "--fipo-half-life", "16", "--print-config"])
    assert stop.value.code == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["batch.n_samples_per_prompt", "16", "preset"] in rows
    assert ["loss.half_life", "16.0", "flag"] in rows
    assert ["run.seed", "1234", "default"] in rows


def test_print_config_shows_every_setting_with_its_origin(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    flags = ["--preset", "dapo-qwen2.5-32b", "--lr", "2e-6", "--micro-batch-size", "1", "--sglang-page-size", "16"]
    with pytest.raises(SystemExit) as stop:
        parse(*flags, "--print-config")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["megatron.lr"] == ["2e-06", "flag"]
    assert rows["batch.num_updates_per_rollout"] == ["16", "preset"]
    assert rows["run.seed"] == ["1234", "default"]
    assert rows["rollout.overlong_penalty"] == ["true", "preset"]
    assert rows["engine.server_args.page_size"] == ["16", "flag"]
    assert set(parse(*flags).provenance) <= set(rows)
    assert "note: --micro-batch-size 1 has no effect" in out


def test_only_the_first_rank_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse("--help")
    assert capsys.readouterr().out == ""


def test_help_is_grouped_and_short(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--no-such-flag", "-h"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 200
    assert max(map(len, out.splitlines())) <= 120
    positions = [out.index(f"\n{group}:\n") for group in ("run", "model and parallelism", "batch and optimizer")]
    assert positions == sorted(positions)
    for flag in ("--fipo-half-life", "--[no-]dynamic-sampling", "--help-sglang", "--tensor-model-parallel-size"):
        assert flag in out
    assert "--sglang-mem-fraction-static" not in out


def test_every_option_has_help_and_every_flag_one_option():
    seen = set()
    for option in all_options():
        assert option.help or is_sglang_field(option) or not option.listed
        for flag in option.flags:
            assert flag not in seen
            seen.add(flag)
    assert "(default: 0.28; grpo 0.2)" in help_text(own_options())


def test_help_says_of_a_flag_that_switches_something_off_that_it_does():
    entries = re.split(r"\n  (?=-)", megatron_help_text(all_options()))
    words = {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in entries}
    assert "switches off: If true, fuses weight gradient" in words["--no-gradient-accumulation-fusion"]
    assert "switches off: Include/exclude a bias term" in words["--disable-bias-linear"]
    assert words["--accumulate-allreduce-grads-in-fp32"].endswith("--grad-reduce-in-bf16 switches it off.")
    assert "switches" not in words["--check-for-large-grads"] + words["--untie-embeddings-and-output-weights"]


def test_the_flags_are_the_frozen_list():
    flags = sorted(flag for option in all_options() for flag in option.flags if not is_sglang_field(option))
    assert flags == FLAGS_FILE.read_text(encoding="utf-8").split(), "renaming or dropping a flag breaks users' scripts"


def test_parsing_imports_nothing_heavy():
    program = (
        "import json, sys\n"
        "from megatron_fipo.arguments import parse_arguments\n"
        f"parse_arguments({BASE!r})\n"
        "print(json.dumps([name for name in ('torch', 'megatron', 'sglang', 'transformers') if name in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    assert done.stderr == ""
