"""How context parallelism cuts packed sequences: 2 cp equal pieces each, rank r holds pieces r and 2 cp - 1 - r.

Causal attention makes late pieces dearer than early ones; the pairing gives every rank the same work. This is the
layout of Megatron and Transformer Engine for packed ("thd") batches: locally, per sequence, the early piece and then
the late one. `cu_seqlens` are global padded offsets: int32 [num_seqs + 1], first 0, last T_local * cp.
"""

from __future__ import annotations

import torch
from torch import Tensor


def require_cuttable(cu_seqlens: Tensor, cp_size: int) -> None:
    """Raise ValueError unless every sequence of `cu_seqlens` is a multiple of 2 * cp_size tokens (cp_size 1: any)."""
    if cp_size == 1:
        return
    lengths = cu_seqlens.diff()
    if bool((lengths % (2 * cp_size)).any()):
        raise ValueError(
            f"cu_seqlens holds sequences of {lengths.tolist()} tokens, but over {cp_size} context-parallel ranks each"
            f" must be padded to a multiple of {2 * cp_size}"
        )


def local_cu_seqlens(cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """Offsets of the sequences in one rank's tokens: int32 [num_seqs + 1], first 0, last T_local."""
    require_cuttable(cu_seqlens, cp_size)
    return cu_seqlens // cp_size


def zigzag_indices(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """Where each local token of `cp_rank` lies in the whole pack: int64 [T / cp_size], on cu_seqlens' device.

    `whole[zigzag_indices(...)]` is the rank's share of anything per-token.
    """
    require_cuttable(cu_seqlens, cp_size)
    num_tokens = int(cu_seqlens[-1])
    everywhere = torch.arange(num_tokens, device=cu_seqlens.device)
    if cp_size == 1:
        return everywhere
    lengths = cu_seqlens.diff().long()
    starts = cu_seqlens[:-1].long().repeat_interleave(lengths)
    piece_len = (lengths // (2 * cp_size)).repeat_interleave(lengths)
    piece = (everywhere - starts) // piece_len
    return everywhere[(piece == cp_rank) | (piece == 2 * cp_size - 1 - cp_rank)]
