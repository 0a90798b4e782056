"""Seeded drawing: the right distribution, repeatable, robust to rounding, inside top-k and top-p."""

from __future__ import annotations

import torch

from megatron_fipo.patches.sglang_cpu.seeded_sampling import draw, keep_top_k_top_p


def test_draws_follow_the_weights() -> None:
    weights = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    num_draws = 20000
    drawn = draw(weights.expand(num_draws, 5), torch.arange(num_draws), torch.full((num_draws,), 3))
    frequency = torch.bincount(drawn, minlength=5) / num_draws
    assert frequency[1] == 0
    assert (frequency - weights).abs().max() < 4 * (0.25 / num_draws) ** 0.5


def test_rare_entries_are_drawn_as_often_as_they_should_be() -> None:
    """200 draws over 40001 entries: the many rare ones together weigh as much as the single frequent one."""
    weights = torch.cat([torch.ones(1), torch.full((40000,), 1 / 40000)]).expand(200, -1)
    drawn = draw(weights, torch.arange(200), torch.zeros(200, dtype=torch.int64))
    assert 0.36 < (drawn == 0).float().mean() < 0.64
    rare = drawn[drawn > 0]
    assert len(rare.unique()) == len(rare)


def test_a_draw_depends_on_its_own_row_seed_and_position_alone() -> None:
    weights = torch.rand(6, 999, generator=torch.Generator().manual_seed(0))
    seeds, positions = torch.tensor([1, 2, 3, 4, 5, 2**31 - 1]), torch.tensor([0, 7, 7, 1, 100, 5])
    together = draw(weights, seeds, positions)
    for row in range(6):
        assert draw(weights[row : row + 1], seeds[row : row + 1], positions[row : row + 1]) == together[row]
    assert (draw(weights, seeds + 1, positions) != together).sum() >= 5
    assert (draw(weights, seeds, positions + 1) != together).sum() >= 5


def test_rounding_noise_in_the_weights_seldom_changes_a_draw() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(500, 1000, generator=generator).mul(3).softmax(-1)
    noisy = weights * (1 + 1e-3 * torch.randn(weights.shape, generator=generator))
    seeds, positions = torch.arange(500), torch.arange(500)
    assert (draw(weights, seeds, positions) != draw(noisy, seeds, positions)).sum() <= 5


def test_top_k_and_top_p_keep_the_shortest_prefix_that_reaches_p() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).repeat(5, 1)
    top_ks = torch.tensor([4, 2, 4, 1, 4])
    top_ps = torch.tensor([1.0, 1.0, 0.7, 1.0, 0.71])
    kept = keep_top_k_top_p(probs, top_ks, top_ps)
    assert (kept > 0).tolist() == [
        [True, True, True, True],
        [False, True, False, True],
        [False, True, False, True],
        [False, True, False, False],
        [False, True, True, True],
    ]
    assert torch.equal(kept[kept > 0], probs[kept > 0])
