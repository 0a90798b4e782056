"""megatron-core 0.16 on a machine without CUDA. Nothing happens at import: call `apply_patches()`."""

from megatron_fipo.patches.megatron_cpu.apply import PATCHES, apply_patches

__all__ = ["PATCHES", "apply_patches"]
