"""The correction between engine and trainer: weights of tokens from their two log-probs under the old policy.

TIS truncates the importance ratio (Yao et al., "Your efficient RL framework secretly brings you off-policy RL
training"); IcePop also drops tokens whose ratio is far from 1 (arXiv 2510.18855). Both stand outside FIPO's f.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fipo.config import CorrectionSettings
from megatron_fipo.losses.update_metrics import TokenStats

RATIO = "correction_ratio"  # of token_stats: rho of every response token [n], before any bound


def correction_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor, correction: CorrectionSettings
) -> tuple[Tensor, TokenStats] | None:
    """(w, what `correction_metrics` wants of these tokens), or None when no correction is on.

    All [T] fp32 or float64, loss_mask bool. rho = exp(old_logprobs - rollout_logprobs), trainer over engine;
    w = clamp(rho, tis_clip_low, tis_clip) with TIS, rho inside [icepop_low, icepop_high] and 0 outside with IcePop.
    Nothing is read off the mask, where w is 1. A log-prob in the mask that is not finite makes w NaN.
    """
    if not (correction.use_tis or correction.use_icepop):
        return None
    difference = torch.where(loss_mask, old_logprobs, 0) - torch.where(loss_mask, rollout_logprobs, 0)
    # an infinite log-prob is a broken one, not a ratio of 0 or one to be truncated: 0 * inf is NaN
    ratio = (difference + 0.0 * difference).exp().detach()
    return _bounded(ratio, correction), {RATIO: ratio[loss_mask]}


def correction_metrics(token_stats: TokenStats, correction: CorrectionSettings) -> dict[str, float]:
    """Metrics of the weights over a whole mini-batch; none when no correction is on.

    tis/mean, tis/min, tis/max of w, tis/clip_low_frac and tis/clip_high_frac, the share of tokens whose ratio was
    raised or cut; with IcePop icepop/mean, icepop/masked_frac and its two parts, icepop/masked_low_frac and
    icepop/masked_high_frac. Shares and means are over the response before any drop.
    """
    if not (correction.use_tis or correction.use_icepop):
        return {}
    ratio = token_stats[RATIO].double()
    weights = _bounded(ratio, correction)
    num_tokens = max(ratio.numel(), 1)
    low, high = _bounds(correction)
    below, above = float((ratio < low).sum()) / num_tokens, float((ratio > high).sum()) / num_tokens
    mean = float(weights.sum()) / num_tokens
    if correction.use_icepop:
        return {
            "icepop/mean": mean,
            "icepop/masked_frac": below + above,
            "icepop/masked_low_frac": below,
            "icepop/masked_high_frac": above,
        }
    extremes = (float(weights.min()), float(weights.max())) if ratio.numel() else (0.0, 0.0)
    return {
        "tis/mean": mean,
        "tis/min": extremes[0],
        "tis/max": extremes[1],
        "tis/clip_low_frac": below,
        "tis/clip_high_frac": above,
    }


def _bounds(correction: CorrectionSettings) -> tuple[float, float]:
    if correction.use_tis:
        return correction.tis_clip_low, correction.tis_clip
    return correction.icepop_low, correction.icepop_high


def _bounded(ratio: Tensor, correction: CorrectionSettings) -> Tensor:
    low, high = _bounds(correction)
    if correction.use_tis:
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)  # a NaN stays one
