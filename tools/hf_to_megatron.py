"""Converts a Hugging Face model to a Megatron-LM checkpoint (torch_dist), which any layout loads.
docs/checkpoint-tools.md explains it.

python tools/hf_to_megatron.py --hf-checkpoint DIR --save DIR [--tensor-model-parallel-size N] [--dtype bf16] [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_fipo.conversion_check import DTYPES_BY_FLAG, add_options, check, prepare_check
from megatron_fipo.tool_program import ended, progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, and compare the two models if asked to."""
    options = _parser().parse_args(arguments)
    return ended(lambda: convert(options))


def convert(options: argparse.Namespace) -> int:
    """As the options say; the exit status."""
    from megatron_fipo.actor.conversion import hf_to_megatron

    tokens = prepare_check(options, options.hf_checkpoint)
    with progress("converting") as advance:
        written = hf_to_megatron(
            options.hf_checkpoint,
            options.save,
            tp_size=options.tensor_model_parallel_size,
            vocab_divisible_by=options.make_vocab_size_divisible_by,
            dtype=DTYPES_BY_FLAG[options.dtype],
            advance=advance,
        )
    print(f"{written} holds the model: --load {options.save} in Megatron-LM, --pretrained-checkpoint here")
    return check(options, options.hf_checkpoint, written, tokens) if tokens is not None else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-checkpoint", required=True, metavar="DIR", help="the Hugging Face model")
    parser.add_argument("--save", required=True, metavar="DIR", help="the checkpoint; must be absent or empty")
    parser.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="pad the vocabulary so that it divides by it (default: %(default)s); any layout loads the result",
    )
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="pad the vocabulary to a multiple of this times the former (default: %(default)s, as Megatron-LM)",
    )
    add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
