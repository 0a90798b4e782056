"""The entry point `sglang.srt.platforms`: tells SGLang to use our CPU platform in an engine of ours that asks for it.

Why: without a platform, SGLang 0.5.23 on a CPU falls back to a base class without a device, and its own CPU platform
    (SGLANG_USE_CPU_ENGINE=1) calls AMX kernels of a package that has no wheel.
Upstream: sglang.srt.platforms._resolve_platform
Drop-when: SGLang's own CPU platform runs without sgl-kernel-cpu.
Test: tests/distributed/test_patch_sglang.py
"""

import os
from typing import Final

REPLACES: Final = {
    "sglang.srt.platforms:_resolve_platform": "91fb5f61b3cc4d5c",
}

ASKED_FOR: Final = "MEGATRON_FIPO_CPU_ENGINE"
"""The environment variable that is set to 1 in the processes of an engine on the CPU."""


def activate() -> str | None:
    """The dotted name of our platform class in an engine that asked for it, else None: SGLang calls this wherever it is
    installed beside us, and then chooses for itself."""
    if os.environ.get(ASKED_FOR) != "1":
        return None
    return "megatron_fipo.patches.sglang_cpu.platform.NativeCpuPlatform"
