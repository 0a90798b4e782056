"""The command line of tools/quantize.py, checked."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_fipo.config import RolloutSettings, require
from megatron_fipo.data_config import HELP, DataSettings
from megatron_fipo.quantization.formats import AWQ_GROUP_SIZES, FORMATS, Format

DEFAULTS = DataSettings(prompt_data="-")
DEFAULT_SEQ_LENGTH = 2048
DATA_FIELDS = (
    *("task", "eval_prompt_data", "input_key", "label_key", "apply_chat_template", "prompt_template", "system_prompt"),
    *("deduplicate", "dedup_key", "on_long_prompt", "rm_type", "custom_rm_path", "num_eval_problems"),
)


@dataclass(frozen=True)
class QuantizationRequest:
    """What the command line asks for. `data` holds --calibration-data as its training prompts."""

    hf_checkpoint: str
    save: str
    quant_format: Format
    group_size: int | None
    data: DataSettings
    num_samples: int
    seq_length: int
    response_len: int
    eval_max_response_len: int
    eval_batch_size: int
    device: str
    bf16: bool
    seed: int
    max_shard_bytes: int

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to measure accuracy on."""
        return self.data.task is not None or bool(self.data.eval_prompt_data)


def parse_request(words: Sequence[str] | None) -> QuantizationRequest:
    """Raises ValueError with one line that names the flag, the value found and the value wanted."""
    args = _parser().parse_args(words)
    if (args.task is None) == (args.calibration_data is None):
        raise ValueError(
            "prompts to calibrate on are given by --calibration-data FILE or by --task NAME, by one of them"
        )
    for flag, value in (
        ("--num-calibration-samples", args.num_calibration_samples),
        ("--calibration-seq-length", args.calibration_seq_length),
        ("--eval-max-response-len", args.eval_max_response_len),
        ("--eval-batch-size", args.eval_batch_size),
        ("--max-shard-mb", args.max_shard_mb),
    ):
        require(value >= 1, flag, value, ">= 1")
    require(args.calibration_response_len >= 0, "--calibration-response-len", args.calibration_response_len, ">= 0")
    values: dict[str, Any] = {name: getattr(args, name) for name in DATA_FIELDS}
    try:
        values["task_args"] = json.loads(args.task_args)
    except json.JSONDecodeError as error:
        raise ValueError(f"--task-args is {args.task_args!r}, which is not JSON: {error}") from error
    require(isinstance(values["task_args"], dict), "--task-args", args.task_args, 'a JSON object: {"name": value}')
    values["eval_prompt_data"] = tuple(args.eval_prompt_data)
    if args.rm_type is not None or args.custom_rm_path is not None:
        require(
            args.task is not None or bool(args.eval_prompt_data),
            "--rm-type" if args.rm_type is not None else "--custom-rm-path",
            args.rm_type or args.custom_rm_path,
            "left out without --eval-prompt-data: there is nothing to grade",
        )
    return QuantizationRequest(
        hf_checkpoint=args.hf_checkpoint,
        save=args.save,
        quant_format=args.format,
        group_size=args.group_size,
        data=DataSettings(prompt_data=args.calibration_data, **values),
        num_samples=args.num_calibration_samples,
        seq_length=args.calibration_seq_length,
        response_len=args.calibration_response_len,
        eval_max_response_len=args.eval_max_response_len,
        eval_batch_size=args.eval_batch_size,
        device=args.device,
        bf16=args.bf16,
        seed=args.seed,
        max_shard_bytes=args.max_shard_mb * 2**20,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tools/quantize.py",
        description="Quantises a Hugging Face checkpoint for serving with SGLang. docs/quantization.md explains it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--hf-checkpoint", required=True, metavar="DIR", help="the model to quantise")
    parser.add_argument("--save", required=True, metavar="DIR", help="where the result goes; must be absent or empty")
    parser.add_argument("--format", required=True, choices=FORMATS, help="nvfp4 needs a GPU")
    parser.add_argument(
        "--group-size", type=int, help=f"of int4-awq, one of {AWQ_GROUP_SIZES}; None: the coarsest that fits the model"
    )
    _add_data_options(parser.add_argument_group("calibration prompts, as training reads them"))
    _add_evaluation_options(parser.add_argument_group("accuracy before and after"))
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA when there is any"
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bf16 rather than fp32: half the memory")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the calibration prompts")
    parser.add_argument("--max-shard-mb", type=int, default=4096, help="largest safetensors file, MiB")
    return parser


def _add_data_options(group: Any) -> None:
    group.add_argument("--calibration-data", metavar="FILE", help="a file of prompts with ground truths")
    group.add_argument("--task", help="a task's training problems, instead of a file")
    group.add_argument("--task-args", default="{}", help="the task's parameters as JSON")
    group.add_argument("--num-calibration-samples", type=int, default=512, metavar="N", help="prompts, at most")
    group.add_argument(
        "--calibration-seq-length", type=int, default=DEFAULT_SEQ_LENGTH, metavar="N", help="tokens of the longest one"
    )
    group.add_argument(
        "--calibration-response-len", type=int, default=0, metavar="N", help="also the model's greedy answers, so long"
    )
    group.add_argument(
        "--on-long-prompt",
        choices=("error", "skip", "truncate-left"),
        default="error",
        help=HELP["on_long_prompt"].replace("--rollout-max-prompt-len", "--calibration-seq-length"),
    )
    for name in ("input_key", "label_key", "dedup_key"):
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, default=getattr(DEFAULTS, name), metavar="KEY", help=HELP[name])
    group.add_argument("--deduplicate", action=argparse.BooleanOptionalAction, default=True, help=HELP["deduplicate"])
    group.add_argument("--apply-chat-template", action="store_true", help=HELP["apply_chat_template"])
    group.add_argument("--prompt-template", metavar="TEXT", help=HELP["prompt_template"])
    group.add_argument("--system-prompt", metavar="TEXT", help=HELP["system_prompt"])


def _add_evaluation_options(group: Any) -> None:
    group.add_argument(
        "--eval-prompt-data", nargs="+", default=(), metavar="NAME=FILE", help="problems to answer before and after"
    )
    group.add_argument("--rm-type", help="the reward (default: the task's own)")
    group.add_argument("--custom-rm-path", metavar="MODULE:FUNCTION", help=HELP["custom_rm_path"])
    group.add_argument("--num-eval-problems", type=int, default=DEFAULTS.num_eval_problems, help="held out by a task")
    group.add_argument(
        "--eval-max-response-len",
        type=int,
        default=RolloutSettings.rollout_max_response_len,
        metavar="N",
        help="longest answer, tokens",
    )
    group.add_argument("--eval-batch-size", type=int, default=32, help="problems answered together")
