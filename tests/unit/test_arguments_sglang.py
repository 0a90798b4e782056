"""SGLang's options as `--sglang-*`."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.arguments import parse_arguments
from megatron_fipo.flags.sglang_names import CHOICES, FIELDS_BY_KIND, OTHER_NAMES
from megatron_fipo.flags.sglang_table import OWN_FIELDS, refused_sglang_flags, sglang_options
from megatron_fipo.rollout.server_process import _OWN_ARGUMENTS

ROOT = Path(__file__).resolve().parents[2]
BASE = ["--hf-checkpoint", "model", "--task", "chain_sum"]


def server_args(*flags):
    return parse_arguments([*BASE, *flags]).engine.server_args


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {}),
        (["--sglang-mem-fraction-static", "0.3"], {"mem_fraction_static": 0.3}),
        (["--sglang-max-running-requests=64"], {"max_running_requests": 64}),
        (["--sglang-disable-cuda-graph"], {"disable_cuda_graph": True}),
        (["--sglang-no-log-requests"], {"log_requests": False}),
        (["--sglang-attention-backend", "torch_native"], {"attention_backend": "torch_native"}),
        (["--sglang-cuda-graph-bs-decode", "1", "2", "4"], {"cuda_graph_bs_decode": [1, 2, 4]}),
        (["--sglang-mm-process-config", '{"a": 1}'], {"mm_process_config": {"a": 1}}),
        (["--sglang-max-prefill-tokens", "32k"], {"max_prefill_tokens": 32000}),
        (["--sglang-max-total-tokens", "16Ki"], {"max_total_tokens": 16384}),
        (["--sglang-expert-parallel-size", "2"], {"ep_size": 2}),
        (["--sglang-ep", "2"], {"ep_size": 2}),
        (["--sglang-sampling-backend", "pytorch"], {"sampling_backend": "pytorch"}),
    ],
)
def test_options_reach_the_server_as_they_are(flags, expected):
    assert server_args(*flags) == expected


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--sglang-model-path", "x"], ["--sglang-model-path", "use --hf-checkpoint"]),
        (["--sglang-model", "x"], ["--sglang-model ", "use --hf-checkpoint"]),
        (["--sglang-tensor-parallel-size", "2"], ["--sglang-tensor-parallel-size", "--rollout-num-gpus-per-engine"]),
        (["--sglang-random-seed", "1"], ["--sglang-random-seed", "use --seed"]),
        (["--sglang-dtype", "float32"], ["--sglang-dtype", "use --bf16"]),
        (["--sglang-port", "1"], ["--sglang-port", "chosen by the run"]),
        (["--sglang-skip-tokenizer-init"], ["--sglang-skip-tokenizer-init", "token ids"]),
        (
            ["--sglang-mem-fraction", "0.3"],
            ["not an option of SGLang 0.5.23", "did you mean --sglang-mem-fraction-static"],
        ),
        (["--mem-fraction-static", "0.3"], ["unknown flag --mem-fraction-static"]),
        (["--sglang-page-size", "big"], ["--sglang-page-size is 'big'", "an integer"]),
        (["--sglang-schedule-policy", "fastest"], ["--sglang-schedule-policy is 'fastest'", "lpm, random, fcfs"]),
        (["--sglang-context-length", "4096"], ["--sglang-context-length", "--rollout-max-response-len"]),
        (["--sglang-mm-process-config", "9" * 5000], ["--sglang-mm-process-config is '999", "Exceeds the limit"]),
        (["--sglang-mm-process-config", "[" * 100_000], ["--sglang-mm-process-config is"]),
        (["--sglang-max-total-tokens", "1.5Q"], ["--sglang-max-total-tokens is '1.5Q'", "an integer"]),
    ],
)
def test_wrong_options_are_refused(flags, fragments):
    with pytest.raises(ValueError) as raised:
        server_args(*flags)
    for fragment in fragments:
        assert fragment in str(raised.value)


def test_the_table_is_the_installed_sglangs():
    subprocess.run([sys.executable, "tools/write_flag_tables.py", "--check"], cwd=ROOT, check=True)


def test_what_the_run_sets_itself_is_an_option_of_sglang_and_not_of_ours():
    fields = {name for names in FIELDS_BY_KIND.values() for name in names.split()}
    assert set(OWN_FIELDS) <= fields
    assert set(CHOICES) <= fields
    assert set(OTHER_NAMES) <= fields
    offered = {option.setting.removeprefix("engine.server_args.") for option in sglang_options()}
    assert offered == fields - set(OWN_FIELDS)
    assert len(offered) > 450
    assert set(_OWN_ARGUMENTS) <= set(OWN_FIELDS)
    assert not refused_sglang_flags().keys() & {flag for option in sglang_options() for flag in option.flags}
