"""The runner of ranks itself: values come back, failures are seen, nothing is left running."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import RunRanks, processes_in_session


def ranks_sum(start: torch.Tensor) -> dict[str, torch.Tensor | int]:
    rank = torch.distributed.get_rank()
    total = start + rank
    torch.distributed.all_reduce(total)
    return {"rank": rank, "total": total}


def ranks_fail_on_one(path: str) -> None:
    if os.environ["RANK"] == "1":
        while not Path(path).exists():
            time.sleep(0.01)
        raise ValueError("this rank fails on purpose")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(path + ".new").write_text(f"{os.getpid()} {child.pid}")
    Path(path + ".new").rename(path)
    time.sleep(600)


@pytest.mark.parametrize("fresh", [False, True])
def test_every_rank_returns_its_value_in_order(run_ranks: RunRanks, fresh: bool) -> None:
    results = run_ranks(2, ranks_sum, {"start": torch.tensor([1.5, 2.0])}, fresh=fresh)
    assert [result["rank"] for result in results] == [0, 1]
    assert all(torch.equal(result["total"], torch.tensor([4.0, 5.0])) for result in results)


def test_a_failing_rank_ends_the_others_and_their_children(run_ranks: RunRanks, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="this rank fails on purpose"):
        run_ranks(2, "test_processes:ranks_fail_on_one", {"path": str(tmp_path / "pids")}, init_process_group=False)
    leader, child = map(int, (tmp_path / "pids").read_text().split())
    assert leader not in processes_in_session(leader)
    assert child not in processes_in_session(leader)


def test_a_rank_that_takes_too_long_is_ended(run_ranks: RunRanks) -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"took over 2\.0 s"):
        run_ranks.command(1, ["-c", "import time; time.sleep(600)"], timeout_s=2.0)
    assert time.monotonic() - started < 10
