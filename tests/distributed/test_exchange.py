"""Rank 0's work and errors reach the other ranks: shares, results, failures. Two gloo ranks, started once."""

from __future__ import annotations

import math
import signal
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_ranks

from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.trainer.exchange import shares_of
from megatron_fipo.types import TrainSequence


def make_sequences(num: int) -> list[TrainSequence]:
    """Sequence i has the uid "i" and 2 + (7 i mod 11) tokens."""
    return [make_sequence(str(i), 2 + 7 * i % 11) for i in range(num)]


def make_sequence(uid: str, length: int) -> TrainSequence:
    mask = np.ones(length, dtype=bool)
    mask[-1] = False
    return TrainSequence(
        uid=uid,
        token_ids=np.arange(length),
        loss_mask=mask,
        advantages=mask.astype(np.float32),
        rollout_logprobs=np.zeros(length, dtype=np.float32),
        token_versions=np.full(length, 3),
    )


@pytest.mark.parametrize("num_updates", [1, 2, 4])
@pytest.mark.parametrize("dp", [1, 2, 3])
def test_every_sequence_is_trained_on_once_in_the_update_of_its_place(dp: int, num_updates: int) -> None:
    sequences = make_sequences(24)
    shares = shares_of(sequences, num_updates, ParallelLayout(dp=dp), 8)
    assert [len(share) for share in shares] == [num_updates] * dp
    size = 24 // num_updates
    for update in range(num_updates):
        uids = [int(sequence.uid) for share in shares for sequence in share[update]]
        assert sorted(uids) == list(range(update * size, (update + 1) * size))
        for share in shares:
            order = [int(sequence.uid) for sequence in share[update]]
            assert order == sorted(order)


def test_work_is_balanced_over_the_ranks_inside_every_update() -> None:
    sequences = make_sequences(24)
    for update in range(3):
        shares = shares_of(sequences, 3, ParallelLayout(dp=2), 8)
        lengths = [[len(sequence.token_ids) for sequence in share[update]] for share in shares]
        flops = [sum(12 * 8 * length + 2 * length**2 for length in share) for share in lengths]
        assert abs(flops[0] - flops[1]) <= 12 * 8 * 12 + 2 * 12**2  # the longest sequence's


def test_updates_of_unequal_size_are_a_bug() -> None:
    with pytest.raises(AssertionError, match=r"\(7, 2\)"):
        shares_of(make_sequences(7), 2, ParallelLayout(), 8)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("exchange"), 2, on_two_ranks, {})


def test_a_result_of_rank_zero_stays_there(ranks: list[dict[str, Any]]) -> None:
    assert [rank["result"] for rank in ranks] == [41, None]
    assert [rank["calls"] for rank in ranks] == [1, 0]


def test_an_error_of_rank_zero_is_raised_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["error"] == "ValueError: no problem is left"
    assert ranks[1]["error"] == "RankZeroFailed: rank 0 failed: ValueError: no problem is left"


def test_leaving_the_program_on_rank_zero_is_seen_too(ranks: list[dict[str, Any]]) -> None:
    assert [rank["interrupt"] for rank in ranks] == ["KeyboardInterrupt: ", "KeyboardInterrupt: "]


def test_a_signal_in_what_may_be_interrupted_stops_every_rank(ranks: list[dict[str, Any]]) -> None:
    assert [rank["stop"] for rank in ranks] == ["StopRequested: ", "StopRequested: "]


def test_a_signal_to_rank_zero_alone_is_known_to_all_and_the_first_one_stays(ranks: list[dict[str, Any]]) -> None:
    assert [rank["heard after an error"] for rank in ranks] == [0, 0]
    assert [rank["heard of the user's function"] for rank in ranks] == [signal.SIGINT] * 2
    assert [rank["heard"] for rank in ranks] == [signal.SIGUSR1] * 2
    assert [rank["heard later"] for rank in ranks] == [signal.SIGUSR1] * 2


def test_after_a_failure_all_ranks_do_together_what_is_left(ranks: list[dict[str, Any]]) -> None:
    assert [rank["ended"] for rank in ranks] == [["rank 0, of 2"], ["rank 1, of 2"]]


def test_rank_zero_calls_for_what_all_ranks_do_together(ranks: list[dict[str, Any]]) -> None:
    assert [rank["together"] for rank in ranks] == [["rank 0, of 2"] * 2, ["rank 1, of 2"] * 2]
    assert [rank["after calls"] for rank in ranks] == [42, None]


def test_the_largest_of_all_ranks_is_known_to_all(ranks: list[dict[str, Any]]) -> None:
    assert [rank["largest"] for rank in ranks] == [[-2, 3], [-2, 3]]


def test_shares_reach_the_ranks_that_own_them(ranks: list[dict[str, Any]]) -> None:
    wanted = shares_of(make_sequences(8), 2, ParallelLayout(dp=2), 8)
    for rank, found in enumerate(ranks):
        assert found["dp shares"] == [[sequence.uid for sequence in update] for update in wanted[rank]]
        assert found["tokens"] == [sequence.token_ids.tolist() for update in wanted[rank] for sequence in update]


def test_ranks_of_one_model_replica_get_the_same_share(ranks: list[dict[str, Any]]) -> None:
    everything = [[str(i) for i in range(4)], [str(i) for i in range(4, 8)]]
    assert [rank["tp shares"] for rank in ranks] == [everything, everything]


def test_values_are_gathered_in_rank_order(ranks: list[dict[str, Any]]) -> None:
    assert [rank["gathered"] for rank in ranks] == [["of 0", "of 1"], None]


def test_agreement_covers_every_data_parallel_rank(ranks: list[dict[str, Any]]) -> None:
    # rank r holds 2 + r tokens to train on, each off by r + 1, of entropy r
    assert ranks[1]["agreement"] is None
    wanted = {
        "entropy": (2 * 0 + 3 * 1) / 5,
        "engine_mismatch/mean": (2 * 1 + 3 * 2) / 5,
        "engine_mismatch/max": 2.0,
        "engine_mismatch/num_tokens": 5,
        "engine_mismatch/older_tokens": 0.0,
        "engine_mismatch/ratio_mean": (2 * math.exp(1) + 3 * math.exp(2)) / 5,
    }
    found = ranks[0]["agreement"]
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)


# ---- on every rank


def on_two_ranks() -> dict[str, Any]:
    from megatron_fipo.trainer.agreement import agreement_metrics
    from megatron_fipo.trainer.exchange import RankZero, gather_to_rank_zero, largest, scatter_shares

    control = torch.distributed.group.WORLD
    rank = torch.distributed.get_rank()
    dp, tp = ParallelLayout(dp=2, rank=rank), ParallelLayout(tp=2, rank=rank)
    calls = 0

    def work() -> int:
        nonlocal calls
        calls += 1
        return 41

    def fail() -> None:
        raise ValueError("no problem is left")

    def interrupt() -> None:
        raise KeyboardInterrupt

    def raised_by(function: Any, *, interruptible: bool = False, on: Any = None) -> str:
        try:
            (on or rank_zero).run(function, interruptible=interruptible)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    together: list[str] = []
    rank_zero = RankZero(dp, control)
    rank_zero.together["sync"] = lambda: together.append(f"rank {rank}, of {largest(rank + 1, control)}")

    def call_twice() -> int:
        rank_zero.call("sync")
        rank_zero.call("sync")
        return 42

    result = rank_zero.run(work)
    errors = {"error": raised_by(fail)}
    heard = {"heard after an error": rank_zero.signals.first, **what_is_heard(dp, control)}
    own = RankZero(dp, control)
    errors["interrupt"] = raised_by(interrupt, on=own)
    heard["heard of the user's function"] = int(own.signals.first)
    errors["stop"] = raised_by(interrupt, interruptible=True, on=RankZero(dp, control))
    ended: list[str] = []
    rank_zero.after_failure.append(lambda: ended.append(f"rank {rank}, of {largest(rank + 1, control)}"))
    rank_zero.run(lambda: 0)
    raised_by(fail)
    raised_by(interrupt, interruptible=True, on=RankZero(dp, control, after_failure=rank_zero.after_failure))
    after_calls = rank_zero.run(call_twice)
    sequences = make_sequences(8) if rank == 0 else None
    mine = scatter_shares(sequences, 2, dp, control, 8)
    replicated = scatter_shares(sequences, 2, tp, control, 8)
    length = 3 + rank
    agreement = agreement_metrics(
        [make_sequence("s", length)],
        [torch.full((length,), rank + 1.0)],
        [torch.full((length,), float(rank))],
        weight_version=3,
        layout=dp,
        control=control,
    )
    return {
        "result": result,
        "together": together,
        "ended": ended,
        "after calls": after_calls,
        "largest": [largest(rank - 3, control), largest(3 - rank, control)],
        "calls": calls,
        **errors,
        **heard,
        "dp shares": [[sequence.uid for sequence in update] for update in mine],
        "tokens": [sequence.token_ids.tolist() for update in mine for sequence in update],
        "tp shares": [[sequence.uid for sequence in update] for update in replicated],
        "gathered": gather_to_rank_zero(f"of {rank}", dp, control),
        "agreement": agreement,
    }


def what_is_heard(dp: ParallelLayout, control: Any) -> dict[str, int]:
    """Of a signal that only rank 0 was sent, and of one that came later."""
    from megatron_fipo.trainer.exchange import RankZero, StopRequested

    signalled = RankZero(dp, control)
    if dp.rank == 0:
        signalled.signals.received.append(signal.SIGUSR1)
    with pytest.raises(StopRequested):
        signalled.run(lambda: 41, interruptible=True)
    heard = signalled.signals.first
    signalled.signals.hear_of(signal.SIGTERM)
    return {"heard": heard, "heard later": signalled.signals.first}
