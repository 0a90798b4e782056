"""The layout as a value: coordinates, stages, and what does not divide."""

from __future__ import annotations

import pytest

from megatron_fipo.parallel import ParallelLayout


def test_ranks_are_counted_tp_fastest_then_cp_dp_pp() -> None:
    layouts = [ParallelLayout.for_world(16, rank, tp=2, pp=2, cp=2) for rank in range(16)]
    assert all(layout.dp == 2 and layout.world_size == 16 for layout in layouts)
    coordinates = [(layout.pp_rank, layout.dp_rank, layout.cp_rank, layout.tp_rank) for layout in layouts]
    assert coordinates == [(p, d, c, t) for p in (0, 1) for d in (0, 1) for c in (0, 1) for t in (0, 1)]


def test_what_the_other_axes_leave_over_is_data_parallel() -> None:
    assert ParallelLayout.for_world(6, 0).dp == 6
    assert ParallelLayout.for_world(6, 0, pp=3).dp == 2
    assert ParallelLayout.for_world(8, 0, tp=2, pp=4).dp == 1


def test_the_first_and_last_stage_are_where_the_pipeline_starts_and_ends() -> None:
    layouts = [ParallelLayout.for_world(6, rank, pp=3) for rank in range(6)]
    assert [layout.is_first_stage for layout in layouts] == [True, True, False, False, False, False]
    assert [layout.is_last_stage for layout in layouts] == [False, False, False, False, True, True]
    alone = ParallelLayout()
    assert alone.is_first_stage
    assert alone.is_last_stage


def test_any_rank_knows_the_data_parallel_coordinate_of_every_other() -> None:
    for asking in (0, 5):
        layout = ParallelLayout.for_world(8, asking, tp=2, pp=2)
        found = [layout.dp_rank_of(rank) for rank in range(8)]
        assert found == [ParallelLayout.for_world(8, rank, tp=2, pp=2).dp_rank for rank in range(8)]
        assert found == [0, 0, 1, 1, 0, 0, 1, 1]


def test_axes_that_do_not_divide_the_ranks_name_the_flags() -> None:
    message = r"--tensor-model-parallel-size x .* is 4, but must be a divisor of the number of ranks \(6\)"
    with pytest.raises(ValueError, match=message):
        ParallelLayout.for_world(6, 0, tp=2, pp=2)
    with pytest.raises(ValueError, match=r"--context-parallel-size is 0, but must be >= 1"):
        ParallelLayout.for_world(6, 0, cp=0)


def test_sequence_parallel_needs_tensor_parallel() -> None:
    with pytest.raises(ValueError, match=r"--sequence-parallel is True, but must be used with"):
        ParallelLayout.for_world(2, 0, sequence_parallel=True)
    assert ParallelLayout.for_world(2, 0, tp=2, sequence_parallel=True).sequence_parallel
