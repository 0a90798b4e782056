"""Group advantages and the overlong penalty against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_fipo.losses import group_advantages, overlong_penalty


def test_advantages_are_centred_and_divided_by_the_sample_deviation() -> None:
    found = group_advantages([1.0, -1.0, -1.0, -1.0])
    # mean -0.5, squared deviations 2.25 + 3 x 0.25 = 3, over G - 1 = 3: deviation 1
    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx([1.5 / (1 + 1e-6), *[-0.5 / (1 + 1e-6)] * 3], rel=1e-15)


def test_advantages_of_a_group_of_equal_rewards_are_zero() -> None:
    assert group_advantages([0.1] * 7).tolist() == [0.0] * 7


def test_advantages_are_computed_in_float64_whatever_comes_in() -> None:
    rewards = np.array([1000.0, 1000.0, 1000.001], dtype=np.float32)
    exact = rewards.astype(np.float64)
    wanted = (exact - exact.mean()) / (exact.std(ddof=1) + 1e-6)
    assert group_advantages(rewards).tolist() == pytest.approx(wanted.tolist(), rel=1e-12)


@pytest.mark.parametrize("rewards", [[1.0], [], [[1.0, 2.0]]])
def test_a_group_needs_two_samples(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="n-samples-per-prompt"):
        group_advantages(rewards)


def test_advantages_refuse_rewards_that_are_not_numbers() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        group_advantages([1.0, float("nan")])


@pytest.mark.parametrize(
    ("response_len", "wanted"), [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0)]
)
def test_overlong_penalty_falls_linearly_through_the_buffer(response_len: int, wanted: float) -> None:
    assert overlong_penalty(response_len, 20480, 4096, 1.0) == pytest.approx(wanted, abs=1e-15)
    assert overlong_penalty(response_len, 20480, 4096, 0.5) == pytest.approx(wanted / 2, abs=1e-15)


@pytest.mark.parametrize("buffer_len", [0, -1, 101])
def test_overlong_buffer_must_fit_the_response(buffer_len: int) -> None:
    with pytest.raises(ValueError, match=f"--overlong-buffer-len is {buffer_len}"):
        overlong_penalty(50, 100, buffer_len, 1.0)
