"""The CPU platform: plain PyTorch operators, gloo, no graph capture. SGLang imports it when plugin.activate() names it.

Why: SGLang's own CPU platform calls AMX kernels that no package carries.
Upstream: sglang.srt.platforms.cpu.CpuSRTPlatform, chosen in sglang.srt.platforms.
Drop-when: as in plugin.py.
Test: tests/e2e/test_engine.py
"""

from __future__ import annotations

from typing import Any, Final

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

REPLACES: Final = {
    "sglang.srt.platforms.cpu:CpuDeviceMixin": "c634df2934f011d1",
    "sglang.srt.platforms.cpu:CpuSRTPlatform": "8fa1f5951f500d17",
}


class NativeCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang's CPU device operations with the native (pure PyTorch) forward of every layer."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_dispatch_key_name(self) -> str:
        return "native"
