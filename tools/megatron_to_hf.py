"""Converts a torch_dist checkpoint, Megatron-LM's or a training run's, to a Hugging Face model.
docs/checkpoint-tools.md explains it.

python tools/megatron_to_hf.py --load DIR --hf-checkpoint DIR --save DIR [--dtype bf16] [--check]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from megatron_fipo.config import require
from megatron_fipo.conversion_check import DTYPES_BY_FLAG, add_options, check, prepare_check
from megatron_fipo.tool_program import ended, progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, and compare the two models if asked to."""
    options = _parser().parse_args(arguments)
    return ended(lambda: convert(options))


def convert(options: argparse.Namespace) -> int:
    """As the options say; the exit status."""
    from megatron_fipo.actor.conversion import megatron_to_hf, verify_run
    from megatron_fipo.actor.inspection import find_any_checkpoint

    require(0 < options.max_shard_gb < math.inf, "--max-shard-gb", options.max_shard_gb, "> 0 and finite")
    checkpoint = find_any_checkpoint(options.load)
    tokens = prepare_check(options, options.hf_checkpoint)
    with progress("verifying", "files") as advance:
        verify_run(checkpoint, advance)
    with progress("converting") as advance:
        note = megatron_to_hf(
            checkpoint,
            options.hf_checkpoint,
            options.save,
            dtype=DTYPES_BY_FLAG[options.dtype],
            max_shard_bytes=int(options.max_shard_gb * 10**9),
            advance=advance,
        )
    print(f"{options.save} holds the model of {checkpoint}")
    if note is not None:
        print(f"NOTE: {note}", file=sys.stderr)
    return check(options, options.save, checkpoint, tokens) if tokens is not None else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--load",
        required=True,
        metavar="DIR",
        help="a --save directory of Megatron-LM or a run, or one checkpoint in it",
    )
    parser.add_argument(
        "--hf-checkpoint",
        required=True,
        metavar="DIR",
        help="the model that training started from: its files but the weights",
    )
    parser.add_argument(
        "--save", required=True, metavar="DIR", help="the result; must be absent, empty or an earlier export"
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=4.0, metavar="X", help="largest safetensors file (default: %(default)s)"
    )
    add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
