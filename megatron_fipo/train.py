"""The program: `torchrun --nproc-per-node N -m megatron_fipo.train ...`, one process per rank, every rank the same."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

USER_ERROR = 2
RUN_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors the user can act on into one line on stderr and a non-zero status."""
    from megatron_fipo.arguments import parse_arguments

    is_rank_zero = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    try:
        settings = parse_arguments(arguments)
    except ValueError as error:
        return _fail(error, USER_ERROR, is_rank_zero)

    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")  # upstream's notes to its own developers
    from megatron_fipo.actor.pipeline import NonFiniteUpdate
    from megatron_fipo.rollout.engine import EngineError
    from megatron_fipo.run import run
    from megatron_fipo.trainer.agreement import EngineDisagrees
    from megatron_fipo.trainer.exchange import RankZeroFailed

    try:
        run(settings)
    except ValueError as error:
        return _fail(error, USER_ERROR, is_rank_zero)
    except (EngineError, EngineDisagrees, NonFiniteUpdate) as error:
        return _fail(error, RUN_FAILED, is_rank_zero)
    except RankZeroFailed:
        return RUN_FAILED  # rank 0 says why
    return 0


def _fail(error: Exception, status: int, is_rank_zero: bool) -> int:
    if is_rank_zero:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
