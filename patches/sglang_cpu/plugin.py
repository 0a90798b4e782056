"""The entry point `sglang.srt.platforms`: tells SGLang to use our CPU platform where there is no CUDA.

Why: without a platform, SGLang 0.5.23 on a CPU falls back to a base class without a device, and its own CPU platform
    (SGLANG_USE_CPU_ENGINE=1) calls AMX kernels of a package that has no wheel.
Upstream: sglang.srt.platforms._resolve_platform
Drop-when: SGLang's own CPU platform runs without sgl-kernel-cpu.
Test: tests/unit/test_patch_sglang.py
"""


def activate() -> str | None:
    """The dotted name of our platform class, or None (SGLang then chooses for itself) on a machine with CUDA."""
    import torch

    if torch.cuda.is_available():
        return None
    return "megatron_fipo.patches.sglang_cpu.platform.NativeCpuPlatform"
