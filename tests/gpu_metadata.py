"""What the GPU image's packages demand by their metadata, as the package index has it."""

from __future__ import annotations

REQUIRES: dict[str, dict[str, str]] = {
    "sglang==0.5.23": {
        "python": ">=3.11",
        "torch": "==2.14.1",
        "transformers": "==5.19.0",
        "flashinfer-python": "==0.7.2",
        "sglang-kernel": "==0.4.10",
        "xgrammar": "==0.2.7",
        "torch-memory-saver": ">=0.0.9.post1",
    },
    "megatron-core==0.19.2": {"python": ">=3.12", "torch": ">=2.6.0"},
    "transformer-engine==2.20.2": {"python": ">=3.10.0"},
    "nvidia-modelopt==0.47.0": {"python": "<3.15,>=3.10", "torch": ">=2.8"},
    "torch==2.14.1": {"python": ">=3.10", "cuda-toolkit": "==13.0.3", "triton": "~=3.8.0"},
}
"""By release: `python` is Requires-Python, the others what it requires on Linux without extras."""
