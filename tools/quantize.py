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
from megatron_fipo.train import RUN_FAILED, USER_ERROR

NAMES_HERE = {"--prompt-data": "--calibration-data", "--rollout-max-prompt-len": "--calibration-seq-length"}
"""Flags of training that the data loader's errors name, and what they are called here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status. What the user can act on is one line on stderr and a status of 2."""
    try:
        request = parse_request(arguments)
        warnings.filterwarnings("ignore", module=r"megatron\.|modelopt\.|torch\.|transformers\.")
        from megatron_fipo.quantization.checkpoint import quantize_checkpoint, shown_progress

        print("\n".join(quantize_checkpoint(request, shown_progress)))
        return 0
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr, flush=True)
        return 130
    except ValueError as error:
        message = str(error)
        for name, here in NAMES_HERE.items():
            message = message.replace(name, here)
        print(f"error: {message}", file=sys.stderr, flush=True)
        return USER_ERROR
    except OSError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return RUN_FAILED


if __name__ == "__main__":
    sys.exit(main())
