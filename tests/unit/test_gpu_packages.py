"""Transformer Engine, Apex and GPU that do not do what the flags ask for are named before anything starts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo import gpu_packages
from megatron_fipo.gpu_packages import (
    Machine,
    check_fp8_engines,
    check_gpu_packages,
    check_quantised_training,
    find_packages,
)
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights.architecture import Architecture

HOPPER = Machine("2.20.2", None, has_apex_extension=False, capability=(9, 0), cuda=(13, 0))
ARCH = Architecture(
    family="qwen2",
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=100,
    norm_epsilon=1e-6,
    rope_theta=10000.0,
    rope_scaling_factor=None,
    max_position_embeddings=256,
    tied=True,
    qkv_bias=True,
    qk_layernorm=False,
    dtype=torch.bfloat16,
)


def check(machine: Machine, impl: str = "transformer_engine", tp_size: int = 1, **fields: Any) -> None:
    check_gpu_packages(impl, fields, ARCH, ParallelLayout(tp=tp_size, etp=tp_size), machine)


def test_this_machine_has_no_transformer_engine() -> None:
    """No stand-in: what is installed here."""
    machine = find_packages(cuda=torch.version.cuda)
    assert (machine.transformer_engine, machine.apex, machine.has_apex_extension) == (None, None, False)
    with pytest.raises(
        ValueError, match="--transformer-impl is 'transformer_engine', but Transformer Engine is not"
    ) as e:
        check(machine)
    assert "pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]==2.20.2' (>= 2.3.0, on a" in str(
        e.value
    )
    assert "\n" not in str(e.value)
    check(machine, "local")


def test_the_versions_named_are_the_pinned_ones(repo_root: Path) -> None:
    pins = (repo_root / "requirements" / "gpu.txt").read_text()
    assert f"transformer-engine[core_cu13,pytorch]=={gpu_packages.TRANSFORMER_ENGINE} " in pins
    assert f"ARG APEX={gpu_packages.APEX}\n" in (repo_root / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("1.14.0", "is 1.14.0, and must be >= 2.3.0: .*pip install"),
        ("2.2.0+e5edd6c", r"is 2.2.0\+e5edd6c, and must be >= 2.3.0"),
        ("main", "calls its version 'main', which cannot be compared"),
    ],
)
def test_a_transformer_engine_that_is_too_old_is_refused(version: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"Transformer Engine {message}"):
        check(replace(HOPPER, transformer_engine=version))


def test_the_installed_versions_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"transformer-engine": "1.13.0", "apex": "0.1"}
    monkeypatch.setattr(gpu_packages, "version", versions.__getitem__)
    machine = find_packages((9, 0), "12.8")
    assert machine == Machine("1.13.0", "0.1", has_apex_extension=False, capability=(9, 0), cuda=(12, 8))
    with pytest.raises(ValueError, match=r"Transformer Engine is 1.13.0, and must be >= 2\.3\.0"):
        check(machine)


def test_local_layers_on_cuda_need_apex_or_go_without_it() -> None:
    with pytest.raises(ValueError, match=r"NVIDIA's Apex, but Apex is not installed: APEX_CPP_EXT=1 .*/apex@26\.09'"):
        check(HOPPER, "local")
    with pytest.raises(
        ValueError, match=r"but Apex is 0.9.10dev, without it: too old, built without --cuda_ext, or PyPI"
    ):
        check(replace(HOPPER, apex="0.9.10dev"), "local")
    check(HOPPER, "local", gradient_accumulation_fusion=False)
    check(replace(HOPPER, apex="0.1", has_apex_extension=True), "local")


@pytest.mark.parametrize(
    ("recipe", "version", "capability", "cuda", "message"),
    [
        ("delayed", "2.3.0", (8, 9), (12, 1), None),
        ("delayed", "2.3.0", (8, 0), (12, 9), "compute capability 8.0, and delayed needs Ada, Hopper or newer"),
        ("tensorwise", "2.20.2", (9, 0), (13, 0), None),
        ("tensorwise", "2.20.2", (7, 5), (13, 0), "compute capability 7.5"),
        ("blockwise", "2.20.2", (9, 0), (12, 9), None),
        ("blockwise", "2.20.2", (8, 9), (12, 9), "compute capability 8.9, and blockwise needs Hopper or newer"),
        ("blockwise", "2.20.2", (9, 0), (12, 8), "built with CUDA 12.8: blockwise needs 12.9"),
        ("mxfp8", "2.20.2", (10, 0), (13, 0), None),
        ("mxfp8", "2.20.2", (10, 3), (13, 0), None),
        ("mxfp8", "2.20.2", (9, 0), (13, 0), "compute capability 9.0, and mxfp8 needs Blackwell data-center GPUs"),
        ("mxfp8", "2.20.2", (12, 0), (13, 0), "compute capability 12.0, and mxfp8 needs Blackwell data-center GPUs"),
        ("custom", "2.8.0", (9, 0), (13, 0), "Transformer Engine is 2.8.0, and must be >= 2.9.0"),
    ],
)
def test_a_recipe_wants_a_gpu_a_cuda_and_a_transformer_engine(
    recipe: str, version: str, capability: tuple[int, int], cuda: tuple[int, int], message: str | None
) -> None:
    machine = replace(HOPPER, transformer_engine=version, capability=capability, cuda=cuda)
    if message is None:
        check(machine, fp8="hybrid", fp8_recipe=recipe)
        return
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        check(machine, fp8="hybrid", fp8_recipe=recipe)
    assert f"--fp8-recipe is '{recipe}'" in str(raised.value)


def test_nvfp4_wants_blackwell() -> None:
    with pytest.raises(
        ValueError, match=r"--fp4-recipe is 'nvfp4', .* compute capability 9.0, and nvfp4 needs Blackwell"
    ):
        check(HOPPER, fp4="e2m1")
    check(replace(HOPPER, capability=(10, 0)), fp4="e2m1")


def test_a_model_that_ranks_cut_too_fine_for_a_recipe_is_refused() -> None:
    check(HOPPER, fp8="e4m3", tp_size=2)
    with pytest.raises(
        ValueError, match=r"--fp8-recipe is 'delayed', .* 24 rows of query, key and value .* multiple of 16"
    ):
        check(HOPPER, fp8="e4m3", tp_size=16)


def test_experts_are_cut_by_their_own_ranks() -> None:
    experts = replace(ARCH, family="qwen3_moe", num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=48)
    fields = {"fp8": "hybrid"}
    check_gpu_packages("transformer_engine", fields, experts, ParallelLayout(tp=2, etp=1), HOPPER)
    with pytest.raises(ValueError, match=r"24 FFN channels on a tensor-parallel rank are no multiple of 16"):
        check_gpu_packages("transformer_engine", fields, experts, ParallelLayout(tp=2, etp=2), HOPPER)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fp8_recipe": "blockwise"}, "--fp8-recipe is 'blockwise', but must be used with --fp8-format"),
        ({"fp8_margin": 1}, "--fp8-margin is 1, but must be used with --fp8-format"),
        (
            {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_amax_history_len": 16},
            "--fp8-amax-history-len is 16, but must be used with --fp8-recipe delayed: tensorwise keeps no history",
        ),
        (
            {"fp8": "hybrid", "fp8_recipe": "mxfp8", "fp8_wgrad": False},
            "--no-fp8-wgrad is False, but must be used with",
        ),
        ({"fp8": "hybrid", "fp8_amax_history_len": 0}, "--fp8-amax-history-len is 0, but must be >= 1"),
        ({"fp8": "hybrid", "first_last_layers_bf16": True}, "--first-last-layers-bf16 is True, .* than delayed"),
        ({"first_last_layers_bf16": True}, "--first-last-layers-bf16 is True, but must be used with --fp8-format"),
        (
            {"fp8": "e4m3", "num_layers_at_end_in_bf16": 2},
            "--num-layers-at-end-in-bf16 is 2, .* --first-last-layers-bf16",
        ),
        ({"fp8": "e4m3", "fp8_param": True}, "--fp8-param-gather is True, but must be absent: Megatron would make the"),
        ({"fp8": "e4m3", "fp8_dot_product_attention": True}, "--fp8-dot-product-attention is True, but must be absent"),
        ({"fp8": "e4m3", "fp4": "e2m1"}, "--fp4-format is 'e2m1', but must be absent with --fp8-format"),
        ({"fp4_recipe": "nvfp4"}, "--fp4-recipe is 'nvfp4', but must be used with --fp4-format"),
    ],
)
def test_flags_without_an_effect_or_against_each_other_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_quantised_training(fields)


def test_flags_that_go_together_are_taken() -> None:
    check_quantised_training({})
    check_quantised_training({"fp8": "hybrid", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"})
    both = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2}
    check_quantised_training({"fp8": "e4m3", "fp8_recipe": "blockwise", **both})


def test_fp8_engines_want_a_gpu_that_computes_it_and_whole_blocks() -> None:
    blocks = replace(ARCH, num_query_groups=4)  # of 32 key channels each: 128
    check_fp8_engines(blocks, 1, HOPPER)
    with pytest.raises(ValueError, match="--rollout-fp8 is set, but engines on a CPU hold fp32 or bf16 weights"):
        check_fp8_engines(blocks, 1, replace(HOPPER, capability=None))
    with pytest.raises(ValueError, match=r"--rollout-fp8 .* compute capability 8\.0, and FP8 needs 8\.9"):
        check_fp8_engines(blocks, 1, replace(HOPPER, capability=(8, 0)))
    with pytest.raises(ValueError, match=r"--rollout-fp8 .* 64 key rows on each rank of an engine"):
        check_fp8_engines(blocks, 2, HOPPER)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_engines_go_with_every_recipe_of_the_trainer(recipe: str) -> None:
    check(HOPPER, fp8="hybrid", fp8_recipe=recipe)
    check_fp8_engines(replace(ARCH, num_query_groups=4), 1, HOPPER)
