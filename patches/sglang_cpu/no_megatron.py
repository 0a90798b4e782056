"""Keep megatron-core out of the engine's processes.

Why: SGLang's debugging dumper imports megatron.core wherever it is installed, in every scheduler: about a second of one
    core's time at start, for a plug-in nobody uses.
Upstream: sglang.srt.debug_utils.dumper._MegatronPlugin (an import under `except ImportError`)
Drop-when: the dumper imports its plug-ins when it is switched on.
Test: tests/distributed/test_patch_sglang.py
"""

from __future__ import annotations

import sys
from typing import Final

REPLACES: Final = {
    "sglang.srt.debug_utils.dumper:_MegatronPlugin": "db679cfa335b980e",
}


def keep_megatron_out() -> None:
    """Make `import megatron` fail in this process and its forks, as if it were not installed."""
    assert "megatron" not in sys.modules, "megatron was imported before the engine's patches were applied"
    sys.modules["megatron"] = None  # type: ignore[assignment]  # the documented way to block an import
