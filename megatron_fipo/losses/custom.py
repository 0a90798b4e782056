"""The user's own loss in place of those of the table: where it comes from, and what it must give back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.config import FIPOSettings, PPOSettings
from megatron_fipo.losses.correction import RATIO
from megatron_fipo.losses.update_metrics import PER_CALL_STATS, TokenStats, update_metrics
from megatron_fipo.user_function import load_user_function

FLAG = "--custom-loss-function-path"
POLICY_STATS = ("shift", "advantages", "clipped", "dual_clipped")  # what the authors' metrics are made of
INFLUENCE_STATS = ("influence_weights", "future_kl")  # and those of FIPO

Loss = Callable[..., tuple[Tensor, dict[str, Any]]]


def load_custom_loss(path: str) -> Loss:
    """The function `module:function`, to be called as the losses of LOSSES are; what it gives is checked at every call.

    It returns (loss, info) as they do: loss [] a local sum divided by `denominator`, with its gradient; info a mapping
    with num_kept, the number Megatron divides the gradients by, summed over micro-batches and ranks, and token_stats,
    one-dimensional tensors by name that `custom_metrics` makes metrics of. A call may hold no response token at all (a
    micro-batch that fills up a schedule, a rank's share without responses): give empty tensors then.

    Raises ValueError, naming the flag and `path`, when there is no such function or when it returns anything else; what
    the module raises while it is imported passes through.
    """
    function = load_user_function(FLAG, path)
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"{FLAG} is {path!r}, but must be a plain function, not an async one")

    def checked_loss(*args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        return _checked(function(*args, **kwargs), path)

    return checked_loss


def custom_metrics(token_stats: TokenStats, settings: PPOSettings) -> dict[str, float]:
    """The metrics of an update with the user's own loss: pg_loss, its value, and the mean of each of its token_stats.

    Where token_stats has all that the authors' metrics are made of, those come under their names in place of means.
    """
    known = {name: token_stats[name] for name in PER_CALL_STATS}
    if all(name in token_stats for name in POLICY_STATS):
        names = [*POLICY_STATS, "kl"]
        if isinstance(settings, FIPOSettings) and all(name in token_stats for name in INFLUENCE_STATS):
            names += INFLUENCE_STATS
        known |= {name: token_stats[name] for name in names if name in token_stats}
        metrics = update_metrics(known, settings)
    else:
        loss = known["loss_sum"].sum().double() / known["num_kept"].sum().clamp(min=1)
        metrics = {"pg_loss": float(loss)}
    rest = {name: values.double() for name, values in token_stats.items() if name not in known and name != RATIO}
    return metrics | {name: float(values.sum()) / max(values.numel(), 1) for name, values in rest.items()}


def _checked(result: Any, path: str) -> tuple[Tensor, dict[str, Any]]:
    """`result` with num_kept as a tensor, and loss_sum and num_kept in the token_stats where the loss left them out."""
    wanted = "(loss, info), info a mapping with num_kept and token_stats"
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise ValueError(f"{FLAG} {path!r} returned {_kind(result)}, but must return {wanted}")
    loss, info = result
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise ValueError(f"{FLAG} {path!r} returned {_kind(loss)} as its loss, but must return a tensor of shape ()")
    missing = [name for name in ("num_kept", "token_stats") if name not in info]
    if missing:
        raise ValueError(f"{FLAG} {path!r} returned info without {' and '.join(missing)}, but must return {wanted}")
    num_kept, token_stats = info["num_kept"], info["token_stats"]
    if isinstance(num_kept, int):
        num_kept = torch.tensor(num_kept, device=loss.device)
    if not isinstance(num_kept, Tensor) or num_kept.numel() != 1 or num_kept.is_floating_point():
        raise ValueError(f"{FLAG} {path!r} returned {_kind(num_kept)} as num_kept, but must return one integer")
    if not isinstance(token_stats, Mapping) or not all(
        isinstance(values, Tensor) and values.dim() == 1 for values in token_stats.values()
    ):
        raise ValueError(f"{FLAG} {path!r} returned token_stats that are not a mapping to tensors of one dimension")
    own = {
        "loss_sum": loss.detach().double().reshape(1),
        "num_kept": num_kept.reshape(1),
        **{name: _without_bfloat16(values.detach()) for name, values in token_stats.items()},
    }
    return loss, {**info, "num_kept": num_kept.reshape(()), "token_stats": own}


def _without_bfloat16(values: Tensor) -> Tensor:
    """NumPy, in whose arrays the statistics go to rank 0, does not have it."""
    return values.float() if values.dtype == torch.bfloat16 else values


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple) else "")
