"""faults/fault_program.py for ranks that srun started: `python disturbed_program.py FAULTS ARGUMENTS...`.

Which rank a fault is for is read from srun's variable, and FAULTS_DONE is a file in the directory of the run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "faults")]
import fault_program  # noqa: E402


def main() -> int:
    rank = int(os.environ["SLURM_PROCID"])
    faults = [fault for fault in json.loads(sys.argv[1]) if fault.get("rank", 0) in (None, rank)]
    sys.argv[1] = json.dumps([{**fault, "rank": None} for fault in faults])
    os.environ[fault_program.DONE] = str(Path("faults-done").absolute() / str(rank))
    Path("faults-done").mkdir(exist_ok=True)
    return fault_program.main()


if __name__ == "__main__":
    status = main()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # as the program does
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)
