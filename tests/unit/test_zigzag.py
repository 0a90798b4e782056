"""The zigzag cut: every token on one rank, early and late pieces paired, in Megatron's order."""

from __future__ import annotations

import pytest
import torch

from megatron_fipo.ops.zigzag import local_cu_seqlens, zigzag_indices


def test_a_rank_holds_an_early_and_a_late_piece_of_every_sequence() -> None:
    cu_seqlens = torch.tensor([0, 8, 12], dtype=torch.int32)
    assert zigzag_indices(cu_seqlens, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag_indices(cu_seqlens, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert local_cu_seqlens(cu_seqlens, 2).tolist() == [0, 4, 6]


def test_one_rank_holds_everything_in_order_at_any_length() -> None:
    assert zigzag_indices(torch.tensor([0, 3, 3, 7], dtype=torch.int32), 1, 0).tolist() == list(range(7))


def test_a_sequence_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[8, 6\] tokens.*multiple of 4"):
        zigzag_indices(torch.tensor([0, 8, 14], dtype=torch.int32), 2, 0)
