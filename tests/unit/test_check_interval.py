"""--check-weights-interval says when all that engines hold is compared, and -1 that it never is."""

from __future__ import annotations

import pytest

from megatron_fipo.arguments import parse_arguments
from megatron_fipo.run_config import EngineSettings

COMMAND = ["--hf-checkpoint", "model", "--task", "small_arithmetic", "--rm-type", "small_arithmetic"]


@pytest.mark.parametrize("interval", [-1, 0, 7])
def test_an_interval_is_taken_from_the_command_line(interval: int) -> None:
    settings = parse_arguments([*COMMAND, "--check-weights-interval", str(interval)])
    assert settings.engine.check_weights_interval == interval


def test_an_interval_below_never_is_refused() -> None:
    with pytest.raises(ValueError, match="--check-weights-interval is -2, but must be >= 0 updates, or -1 for never"):
        EngineSettings(check_weights_interval=-2)
