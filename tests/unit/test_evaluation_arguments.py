"""The command line of tools/evaluate.py: the training program's flags, and one line about a wrong one."""

from __future__ import annotations

import pytest

from megatron_fipo.evaluation_arguments import evaluation_help_text, evaluation_options, parse_evaluation
from megatron_fipo.flags.table import all_options

NEEDED = "--hf-checkpoint model --output-dir out --task small_arithmetic".split()
FILES = "--hf-checkpoint model --output-dir out --rm-type dapo_math --eval-prompt-data a=x.jsonl b=y.parquet".split()


def test_flags_reach_their_settings_and_the_rest_are_the_programs_defaults() -> None:
    given = "--n-samples-per-eval-prompt 32 --eval-temperature 1 --eval-top-p 0.7 --eval-top-k 50 --seed 3 --bf16"
    engines = "--rollout-num-engines 2 --rollout-num-gpus-per-engine 4 --sglang-mem-fraction-static 0.5"
    request = parse_evaluation([*FILES, *given.split(), *engines.split()])
    data = request.data
    assert data.eval_prompt_data == ("a=x.jsonl", "b=y.parquet")
    assert (data.n_samples_per_eval_prompt, data.eval_temperature, data.eval_top_p, data.eval_top_k) == (32, 1, 0.7, 50)
    assert (request.run.seed, request.bf16, request.device) == (3, True, "auto")
    assert (request.engine.num_engines, request.engine.tp_size) == (2, 4)
    assert request.engine.server_args == {"mem_fraction_static": 0.5}
    assert (request.max_prompt_len, request.max_response_len) == (2048, 20480)
    assert request.block_size == 16  # of 32 responses each
    assert parse_evaluation(NEEDED).block_size == 512
    assert parse_evaluation([*NEEDED, "--n-samples-per-eval-prompt", "1000"]).block_size == 1
    assert parse_evaluation([*NEEDED, "--eval-max-response-len", "7"]).max_response_len == 7


def test_every_flag_but_the_block_size_is_the_programs_with_its_type() -> None:
    program = {flag: option for option in all_options() for flag in option.flags}
    for option in evaluation_options():
        for flag in option.flags:
            if flag != "--eval-block-size":
                assert (option.setting, option.type) == (program[flag].setting, program[flag].type)


def test_the_help_names_every_flag_that_is_listed() -> None:
    text = evaluation_help_text()
    for option in evaluation_options():
        assert all(flag in text for flag in option.flags) or not option.listed
    assert "--prompt-data" not in text.split()
    assert "--eval-top-p" in text
    assert "--eval-max-response-len\n        longest response, tokens (default: 20480)" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "by --eval-prompt-data NAME=FILE ... or by --task NAME, and by one of them"),
        ([*FILES, "--task", "small_arithmetic"], "by one of them"),
        (["--hf-checkpoint", "model", "--task", "x"], "--output-dir is None, but must be the path of a directory"),
        (["--output-dir", "out", "--task", "x"], "--hf-checkpoint is None"),
        ([*NEEDED, "--eval-temprature", "1"], "unknown flag --eval-temprature; did you mean --eval-temperature"),
        ([*NEEDED, "--prompt-data", "x"], "unknown flag --prompt-data; did you mean --eval-prompt-data"),
        ([*NEEDED, "--rollout-fp8"], "unknown flag --rollout-fp8"),
        ([*NEEDED, "--rollout-placement", "colocated"], "unknown flag --rollout-placement"),
        ([*NEEDED, "--lr", "1"], "--lr is a Megatron-LM flag that is not supported here"),
        ([*NEEDED, "--sglang-model-path", "x"], "--sglang-model-path is decided by the run itself"),
        ([*NEEDED, "--eval-temperature", "warm"], "--eval-temperature is 'warm', but must be a number"),
        ([*NEEDED, "--eval-temperature", "-1"], "--eval-temperature is -1.0, but must be >= 0"),
        ([*NEEDED, "--n-samples-per-eval-prompt", "0"], "--n-samples-per-eval-prompt is 0, but must be >= 1"),
        ([*NEEDED, "--eval-block-size", "0"], "--eval-block-size is 0, but must be >= 1"),
        ([*NEEDED, "--rollout-max-prompt-len", "0"], "--rollout-max-prompt-len is 0, but must be >= 1"),
        ([*NEEDED, "--on-long-prompt", "skip"], "error or truncate-left: evaluation problems are never left out"),
        ([*NEEDED, "--input-key", "q"], "--input-key is given, but has no effect without --eval-prompt-data"),
        ([*FILES, "--num-eval-problems", "3"], "--num-eval-problems is given, but has no effect without --task"),
        ([*FILES, "--task-args", "{}"], "--task-args is given, but has no effect without --task"),
        ([*FILES, "--custom-rm-path", "a:b"], "--rm-type is 'dapo_math', but must be unset when --custom-rm-path"),
        ([*NEEDED, "--seed", "-1"], "--seed is -1"),
    ],
)
def test_a_wrong_command_line_is_one_line_about_the_flag(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_evaluation(words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
