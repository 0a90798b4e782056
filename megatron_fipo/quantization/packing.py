"""How quantised weights lie in files, and what they stand for. Knows tensors only, no library of quantisation.

AWQ, in the layout of AutoAWQ's `gemm` kernels, for a weight [N, K] in groups of G columns: qweight int32 [K, N / 8],
qzeros int32 [K / G, N / 8], scales [K / G, N]; the weight is (code - zero) x scale. Codes are 0 to 15.
"""

from __future__ import annotations

import torch
from torch import Tensor

PACK_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of eight whose code lies in bits 4i to 4i + 3 of an int32."""
AWQ_ZERO = 8
"""The code of a weight of 0: codes stand for -8 to 7."""
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of e2m1, by their three low bits; the fourth is the sign."""


def pack_awq(codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Signed `codes` [N, K] in -8..7 and `scales` [N, K / G] as the three tensors of AWQ, by name."""
    assert -AWQ_ZERO <= int(codes.min()) <= int(codes.max()) < AWQ_ZERO, (codes.min(), codes.max())
    zeros = torch.full(scales.shape, AWQ_ZERO, dtype=torch.int32, device=scales.device)
    return {
        "qweight": _pack_columns((codes.to(torch.int32) + AWQ_ZERO).t()),
        "qzeros": _pack_columns(zeros.t()),
        "scales": scales.t().contiguous(),
    }


def dequantise_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """fp32 [N, K]: what the tensors of `pack_awq` stand for."""
    codes, zeros = _unpack_columns(qweight), _unpack_columns(qzeros)
    group_size = codes.shape[0] // scales.shape[0]
    shifted = codes - zeros.repeat_interleave(group_size, 0)
    return (shifted.float() * scales.float().repeat_interleave(group_size, 0)).t().contiguous()


def dequantise_fp8(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """fp32 [N, K] of a float8_e4m3fn weight with one scale."""
    return weight.float() * weight_scale.float()


def dequantise_nvfp4(weight: Tensor, weight_scale: Tensor, weight_scale_2: Tensor) -> Tensor:
    """fp32 [N, K] of two e2m1 codes per byte [N, K / 2] (the even column in the low bits), a float8_e4m3fn scale for
    each 16 columns [N, K / 16] and one scale of the whole."""
    codes = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2).long()
    values = torch.tensor(FP4_VALUES, device=weight.device)[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    scales = weight_scale.float() * weight_scale_2.float()
    return values * scales.repeat_interleave(codes.shape[-1] // scales.shape[-1], -1)


def _pack_columns(codes: Tensor) -> Tensor:
    """int32 [R, C] of 0..15 -> int32 [R, C / 8]."""
    eights = codes.unflatten(1, (-1, 8))[..., PACK_ORDER].long()
    packed = sum(eights[..., i] << (4 * i) for i in range(8))
    assert isinstance(packed, Tensor)
    return packed.to(torch.int32).contiguous()  # the upper half of the values wraps to negative numbers


def _unpack_columns(packed: Tensor) -> Tensor:
    """int32 [R, C / 8] -> int32 [R, C] of 0..15."""
    shifts = torch.arange(0, 32, 4, device=packed.device)
    eights = (packed[..., None] >> shifts) & 15
    places = torch.tensor(PACK_ORDER, device=packed.device).argsort()
    return eights[..., places].flatten(1)
