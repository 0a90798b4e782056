"""Quantises a Hugging Face checkpoint for serving with SGLang. docs/quantization.md explains it.

python tools/quantize.py --hf-checkpoint DIR --save OUT --format fp8|int4-awq|nvfp4
    (--calibration-data FILE [--eval-prompt-data NAME=FILE --rm-type NAME] | --task NAME) [...]

Needs nvidia-modelopt: bash examples/setup_env.sh quantize
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from megatron_fipo.quantization.request import parse_request
from megatron_fipo.tool_program import ended

NAMES_HERE = {"--prompt-data": "--calibration-data", "--rollout-max-prompt-len": "--calibration-seq-length"}
"""Flags of training that the data loader's errors name, and what they are called here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status. What the user can act on is one line on stderr and a status of 2."""
    return ended(lambda: quantize(arguments))


def quantize(arguments: Sequence[str] | None) -> int:
    """Do what the command line asks for, print what came of it, return 0."""
    warnings.filterwarnings("ignore", module=r"megatron\.|modelopt\.|torch\.|transformers\.")
    try:
        request = parse_request(arguments)
        from megatron_fipo.quantization.checkpoint import quantize_checkpoint, shown_progress

        print("\n".join(quantize_checkpoint(request, shown_progress)))
    except ValueError as error:
        message = str(error)
        for name, here in NAMES_HERE.items():
            message = message.replace(name, here)
        raise ValueError(message) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
