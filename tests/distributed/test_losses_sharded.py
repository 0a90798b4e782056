"""The losses over a context-parallel group: shares add up to the loss of the whole, in value, gradient and metrics."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import Tensor

from megatron_fipo.config import LOSS_AGGREGATIONS, FIPOSettings, PPOSettings
from megatron_fipo.losses import LOSSES, collect_token_stats, fipo_loss, update_metrics
from megatron_fipo.ops.zigzag import zigzag_indices

BASE = FIPOSettings(influence_low=0.8, influence_high=1.2, safety_threshold=3.0, half_life=8.0)
NUM_REAL = 8  # sequences of the mixed pack before its dummy
LENGTHS = (64, 16, 96, 16, 80, 48, 8, 0, 8)  # multiples of 8: pieces for 4 ranks
EIGHTH = slice(8, 16)  # the second of eight pieces of the first sequence: on one rank only, of 2 or of 4


def mixed_pack() -> dict[str, Tensor]:
    """One pack [T] with every kind of sequence that a cut could get wrong; float64."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    num_tokens = int(offsets[-1])
    old = -torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    new = old + 0.3 * torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    advantages = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(num_tokens, generator=generator) < 0.8
    views = [
        {"mask": m, "new": n, "old": o, "advantages": a}
        for m, n, o, a in zip(*(torch.split(x, list(LENGTHS)) for x in (mask, new, old, advantages)))
    ]
    views[0]["mask"][:] = False  # a response on one shard only
    views[0]["mask"][EIGHTH] = True
    views[1]["mask"][:] = False  # an empty response
    views[3]["mask"][:] = False  # a response of one token
    views[3]["mask"][6] = True
    views[4]["mask"][:10], views[4]["mask"][10:50], views[4]["mask"][50:] = False, True, False  # on boundaries (80 / 8)
    views[-1]["mask"][:] = False  # the dummy
    views[6]["mask"][-1] = False
    for sequence, positions in ((2, (5, 90)), (5, (17,)), (4, (12, 13, 45))):  # dual-clipped: 2 apart, 1, 3
        view = views[sequence]
        view["mask"][list(positions)] = True
        view["advantages"][list(positions)] = -1.0
        view["new"][list(positions)] = view["old"][list(positions)] + 3.0
    return {"new": new, "old": old, "advantages": advantages, "mask": mask, "cu_seqlens": offsets}


def lonely_pack() -> dict[str, Tensor]:
    """One sequence whose response lies in one piece: all other ranks hold no response token."""
    pack = mixed_pack()
    inputs = {name: tensor[: LENGTHS[0]].clone() for name, tensor in pack.items() if name != "cu_seqlens"}
    return {**inputs, "cu_seqlens": torch.tensor([0, LENGTHS[0]], dtype=torch.int32)}


def broken_pack() -> dict[str, Tensor]:
    """A NaN log-prob in the middle of a response that is cut."""
    pack = mixed_pack()
    position = sum(LENGTHS[:2]) + 40
    pack["mask"][position] = True
    pack["new"][position] = torch.nan
    return pack


def weighted_pack() -> dict[str, Tensor]:
    """Token weights, a third of them 0, and reference log-probs; neither is a number off the mask."""
    pack = mixed_pack()
    generator = torch.Generator().manual_seed(1)
    weights, noise = torch.rand(2, len(pack["mask"]), generator=generator, dtype=torch.float64)
    weights = torch.where(weights < 1 / 3, 0.0, 2 * weights)
    pack["token_weights"] = torch.where(pack["mask"], weights, torch.nan)
    pack["reference_logprobs"] = torch.where(pack["mask"], pack["new"] + noise - 0.5, torch.nan)
    return pack


PACKS = {"mixed": mixed_pack, "lonely": lonely_pack, "broken": broken_pack, "weighted": weighted_pack}


def all_cases() -> Iterator[tuple[str, str, PPOSettings, dict[str, Any]]]:
    """(name, pack, settings, keywords); the name begins with the algorithm's."""
    for loss_agg, fused in itertools.product(LOSS_AGGREGATIONS, (True, False)):
        for pack in ("mixed", "lonely", "broken") if loss_agg == "token-mean" else ("mixed", "lonely"):
            options = {"max_response_len": 100, "fused": fused}
            if pack != "lonely":
                options["num_sequences"] = NUM_REAL
            for semantics in ("paper", "released"):
                settings = dataclasses.replace(BASE, semantics=semantics, loss_agg=loss_agg)  # type: ignore[arg-type]
                yield f"fipo/{pack}/{semantics}/{loss_agg}/{fused}", pack, settings, options
            plain = PPOSettings(dual_clip=None if fused else 10.0, loss_agg=loss_agg)  # type: ignore[arg-type]
            yield f"dapo/{pack}/{loss_agg}/{fused}", pack, plain, options
        options = {"max_response_len": 100, "fused": fused, "num_sequences": NUM_REAL, "kl_coef": 0.3}
        for name, base in (("fipo", dataclasses.replace(BASE, semantics="released")), ("grpo", PPOSettings())):
            settings = dataclasses.replace(base, loss_agg=loss_agg)  # type: ignore[arg-type]
            yield f"{name}/weighted/{loss_agg}/{fused}", "weighted", settings, options
    yield "fipo/mixed/denominator", "mixed", dataclasses.replace(BASE, semantics="released"), {"denominator": 1.0}


def score(inputs: dict[str, Tensor], name: str, settings: PPOSettings, options: dict[str, Any]) -> dict[str, Any]:
    logprobs = inputs["new"].clone().requires_grad_()
    loss, info = LOSSES[name.split("/", maxsplit=1)[0]](
        logprobs,
        inputs["old"],
        inputs["advantages"],
        inputs["mask"],
        settings,
        cu_seqlens=inputs["cu_seqlens"],
        token_weights=inputs.get("token_weights"),
        reference_logprobs=inputs.get("reference_logprobs"),
        **options,
    )
    loss.backward()
    assert logprobs.grad is not None
    per_token = {key: info[key].clone() for key in ("future_kl", "influence_weights", "loss_mask")}
    return {
        "loss": loss.detach(),
        "num_kept": info["num_kept"],
        "token_stats": info["token_stats"],
        "metrics": {key: value for key, value in info.items() if isinstance(value, float)},
        "gradient": logprobs.grad,
        **per_token,
    }


def score_shares() -> dict[str, Any]:
    """Every case on this rank's share over all four ranks, and over the first two; keys "ranks/case"."""
    found = {}
    pair = dist.new_group([0, 1])
    groups = [dist.group.WORLD, pair] if dist.get_rank() < 2 else [dist.group.WORLD]
    for group in groups:
        assert group is not None
        for name, pack, settings, options in all_cases():
            whole = PACKS[pack]()
            mine = zigzag_indices(whole["cu_seqlens"], group.size(), group.rank())
            share = {key: value if key == "cu_seqlens" else value[mine] for key, value in whole.items()}
            found[f"{group.size()}/{name}"] = score(share, name, settings, {**options, "group": group})
    found["exchanged"] = exchanged_numbers()
    return found


def exchanged_numbers() -> dict[str, list[int]]:
    """How many numbers each collective takes from this rank, for a training loss on three sequences of 4000 tokens."""
    offsets = torch.tensor([0, 4000, 8000, 12000], dtype=torch.int32)
    generator = torch.Generator().manual_seed(dist.get_rank())
    old, shift, advantages = torch.randn(3, 12000 // dist.get_world_size(), generator=generator)
    logprobs = (old + 0.1 * shift).requires_grad_()
    settings = dataclasses.replace(BASE, semantics="released")
    found = {}
    for fused in (True, False):
        with torch.profiler.profile(record_shapes=True) as profile:
            loss, _ = fipo_loss(
                logprobs,
                old,
                advantages,
                torch.ones_like(old),
                settings,
                cu_seqlens=offsets,
                group=dist.group.WORLD,
                fused=fused,
                with_metrics=False,
            )
            loss.backward()
        found[str(fused)] = [
            math.prod(event.input_shapes[0]) for event in profile.events() if event.name.startswith("gloo:")
        ]
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("shares"), 4, score_shares)


def test_ranks_exchange_two_numbers_per_sequence_and_no_token(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        # pieces' totals, and the counts of response and dual-clipped tokens
        assert rank["exchanged"] == {"True": [6, 6], "False": [6, 6]}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_shares_add_up_to_the_whole(num_ranks: int, ranks: list[dict[str, Any]]) -> None:
    num_dropped = 0
    for name, pack, settings, options in all_cases():
        whole_inputs = PACKS[pack]()
        whole = score(whole_inputs, name, settings, {**options, "fused": False})
        shares = [rank[f"{num_ranks}/{name}"] for rank in ranks[:num_ranks]]
        close = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(sum(share["loss"] for share in shares), whole["loss"], **close)
        assert int(sum(share["num_kept"] for share in shares)) == int(whole["num_kept"]), name
        for key in ("gradient", "future_kl", "influence_weights", "loss_mask"):
            joined = torch.empty_like(whole[key])
            for rank, share in enumerate(shares):
                joined[zigzag_indices(whole_inputs["cu_seqlens"], num_ranks, rank)] = share[key]
            torch.testing.assert_close(joined, whole[key], **close)
        for share in shares:
            assert share["metrics"] == pytest.approx(whole["metrics"], rel=1e-10, abs=1e-12, nan_ok=True), name
        collected = update_metrics(collect_token_stats([share["token_stats"] for share in shares]), settings)
        assert collected == pytest.approx(whole["metrics"], rel=1e-10, abs=1e-12, nan_ok=True), name
        num_dropped += int(whole["loss_mask"].sum() < whole_inputs["mask"].sum())
        if pack == "broken":
            assert whole["loss"].isnan()
        if pack == "weighted":
            assert whole["metrics"]["kl_loss"] > 0.01
        if pack == "lonely" and options.get("fused"):
            assert sorted(int(share["token_stats"]["shift"].numel()) for share in shares) == [0] * (num_ranks - 1) + [8]
    # released semantics: the sequences whose dual-clipped tokens lie apart; without the exchange none would go
    assert num_dropped == 2 * (2 * len(LOSS_AGGREGATIONS) + 1) + 1
