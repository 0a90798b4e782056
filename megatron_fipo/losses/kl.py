"""The KL term against a reference policy: an estimate per token that is never negative."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fipo.ops.future_kl import SHIFT_BOUND


def kl_estimates(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The k3 estimator of KL(policy || reference), of every token: exp(x) - x - 1 (Schulman, "Approximating KL
    Divergence"; GRPO, arXiv 2402.03300, eq. 4), x = clamp(reference_logprobs - logprobs, -20, 20).

    All [T], mask bool. Returns [T] float64, whatever the dtypes: near x = 0 the terms cancel. 0 off the mask, where
    nothing is read; the gradient, 1 - exp(x), goes through logprobs. NaN where a log-prob in the mask is not finite.
    """
    difference = torch.where(mask, reference_logprobs, 0).double() - torch.where(mask, logprobs, 0).double()
    # as in the policy loss: the clamp alone would hide an infinity
    x = difference.clamp(-SHIFT_BOUND, SHIFT_BOUND) + 0.0 * difference
    return x.expm1() - x
