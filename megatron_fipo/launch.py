"""torchrun with a quiet end: `python -m megatron_fipo.launch --nproc-per-node 2 -m megatron_fipo.train ...`.

Takes torchrun's arguments and is torchrun, but when a rank fails: torchrun then prints a report and a traceback of its
own, some fifty lines below the one line in which the rank said why. Here only a rank that a signal ended is reported.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

FIRST_SIGNAL_STATUS = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun; returns 0, the status of the rank that failed first, or 128 + the signal that ended it or us."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # what torchrun says about each rank it ends; its own failures are exceptions
    try:
        run.main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            said = [other.error_file_data for other in error.failures.values() if "said_aloud" in other.error_file_data]
            if said and not any(data["said_aloud"] for data in said):  # the rank that speaks was ended before it could
                print(f"error: {said[0]['message']['message']}", file=sys.stderr, flush=True)
            return failure.exitcode
        print(f"error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr, flush=True)
        return FIRST_SIGNAL_STATUS - failure.exitcode
    except SignalException as error:
        return FIRST_SIGNAL_STATUS + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
