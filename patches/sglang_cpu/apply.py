"""Apply the patches of this package in the process that launches an engine; its children are forked with them."""

from __future__ import annotations

from megatron_fipo.patches.sglang_cpu.batched_attention import register_batched_attention
from megatron_fipo.patches.sglang_cpu.deterministic import allow_deterministic_inference_on_cpu
from megatron_fipo.patches.sglang_cpu.forked_children import fork_engine_children
from megatron_fipo.patches.sglang_cpu.import_stubs import install_import_stubs
from megatron_fipo.patches.sglang_cpu.no_megatron import keep_megatron_out
from megatron_fipo.patches.sglang_cpu.seeded_sampling import register_seeded_sampler


def apply_sglang_cpu() -> None:
    """Make this process ready to import SGLang and serve on a CPU. RuntimeError on a machine with CUDA."""
    import torch

    if torch.cuda.is_available():
        raise RuntimeError("the CPU patches of SGLang were asked for on a machine with CUDA")
    install_import_stubs()
    keep_megatron_out()
    allow_deterministic_inference_on_cpu()
    register_seeded_sampler()
    register_batched_attention()
    fork_engine_children()
