"""What the pieces of a context-parallel cut owe each other: the recurrence's value behind each, from one small gather.

The cut is zigzag.py's: 2 cp equal pieces per sequence, rank r holds pieces r and 2 cp - 1 - r. Derivation: README.md.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def piece_carries(totals: Tensor, piece_lens: Tensor, gamma: float, group: dist.ProcessGroup) -> Tensor:
    """The value of F_t = k_t + gamma F_{t+1} at the first token after each local piece; 0 after a sequence's last.

    totals: [2 * num_seqs] float64, per sequence the early and the late local piece: F at the piece's first token if
        nothing came after the piece; 0 for an empty piece.
    piece_lens: [num_seqs] int64, tokens in each of the sequence's pieces, the same on all ranks; 0 is fine.
    group: the context-parallel axis. One all-gather of totals, none when there are no sequences.
    Returns [2 * num_seqs] float64 in the order of totals. Every rank combines the same numbers in the same order, so
    which rank holds which piece changes no bit. A NaN total reaches all earlier pieces of its sequence, no other.
    """
    num_seqs = piece_lens.numel()
    assert totals.dtype == torch.float64, totals.dtype
    assert totals.shape == (2 * num_seqs,), f"totals of shape {tuple(totals.shape)} for {num_seqs} sequences"
    if num_seqs == 0:
        return totals
    gathered = totals.new_empty(group.size(), 2 * num_seqs)
    dist.all_gather(list(gathered), totals.contiguous(), group=group)
    early, late = gathered.view(-1, num_seqs, 2).unbind(dim=2)
    carries = carries_between_pieces(torch.cat([early, late.flip(0)]), piece_lens, gamma)
    rank = group.rank()
    return torch.stack([carries[rank], carries[-1 - rank]], dim=1).view(-1)


def carries_between_pieces(totals: Tensor, piece_lens: Tensor, gamma: float) -> Tensor:
    """The same for all pieces at once, without a group: totals [num_pieces, num_seqs] float64, first piece first.

    carry_p = total_{p+1} + gamma^len carry_{p+1}, from the last piece, whose carry is 0, to the first.
    """
    decay = torch.pow(gamma, piece_lens.to(totals))
    carries = torch.zeros_like(totals)
    for piece in reversed(range(totals.shape[0] - 1)):
        carries[piece] = totals[piece + 1] + decay * carries[piece + 1]
    return carries


def piece_offsets(offsets: Tensor) -> Tensor:
    """Offsets of a rank's pieces, int64 [2 * num_seqs + 1], from those of its sequences, all of even length."""
    starts = offsets[:-1]
    halves = torch.stack([starts, starts + offsets.diff() // 2], dim=1).view(-1)
    return torch.cat([halves, offsets[-1:]])
