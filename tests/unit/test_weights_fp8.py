"""FP8 in blocks: the format, the error bound, what is quantised, what an engine can hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import save_model

from megatron_fipo.weights import fp8
from megatron_fipo.weights.architecture import hf_shapes, read_architecture


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (300, 576), (7, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_is_within_the_bound(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-6, 3, shape[1])
    weight = weight.to(dtype)
    quantised, scale_inv = fp8.quantise(weight)
    assert quantised.dtype == torch.float8_e4m3fn
    assert quantised.shape == weight.shape
    assert scale_inv.dtype == torch.float32
    assert scale_inv.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    found = fp8.dequantise(quantised, scale_inv)
    scales = scale_inv.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    bound = torch.maximum(weight.float().abs() / 16, scales / 1024) * (1 + 1e-6)
    assert bool(((found - weight.float()).abs() <= bound).all())


def test_the_scale_is_that_of_the_blocks_largest_element() -> None:
    weight = torch.zeros(256, 256)
    weight[3, 5], weight[200, 7], weight[130, 255] = -896.0, 44.8, 0.001
    quantised, scale_inv = fp8.quantise(weight)
    assert torch.allclose(scale_inv, torch.tensor([[2.0, 1.0], [0.1, 0.001 / 448]]))
    assert float(quantised[3, 5]) == -448.0
    assert float(quantised[200, 7]) == float(quantised[130, 255]) == 448.0
    assert int((quantised.float() != 0).sum()) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_fp8_form(value: float) -> None:
    weight = torch.ones(130, 130)
    weight[129, 0] = value
    with pytest.raises(ValueError, match=r"shape \(130, 130\) has NaN or infinite"):
        fp8.quantise(weight)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_linear_weights_are_quantised_and_nothing_else(family: str, tmp_path) -> None:
    save_model(tmp_path, family, tied=False)
    kept = {name for name in hf_shapes(read_architecture(tmp_path)) if not fp8.is_quantised(name)}
    parts = {name.split(".", 3)[3] if ".layers." in name else name for name in kept}
    wanted = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "input_layernorm.weight"}
    wanted |= {"post_attention_layernorm.weight"}
    wanted |= {f"self_attn.{which}_proj.bias" for which in "qkv"} if family == "qwen2" else set()
    wanted |= {"self_attn.q_norm.weight", "self_attn.k_norm.weight"} if family.startswith("qwen3") else set()
    wanted |= {"mlp.gate.weight"} if family == "qwen3_moe" else set()
    assert parts == wanted


def test_a_quantised_weight_and_its_scale_become_one_tensor_again() -> None:
    name, norm = "model.layers.0.mlp.up_proj.weight", torch.ones(4)
    quantised, scale_inv = fp8.quantise(torch.randn(130, 5))
    stream = [(name, quantised), (f"{name}_scale_inv", scale_inv), ("model.norm.weight", norm)]
    (first, weight), (second, same) = fp8.dequantised(stream)
    assert (first, second) == (name, "model.norm.weight")
    assert torch.equal(weight, fp8.dequantise(quantised, scale_inv).bfloat16())
    assert same is norm
    with pytest.raises(ValueError, match=r"up_proj.weight is FP8, but model.norm.weight follows it"):
        list(fp8.dequantised([stream[0], stream[2]]))
    with pytest.raises(ValueError, match=r"up_proj.weight is FP8, but its scale is missing"):
        list(fp8.dequantised(stream[:1]))


def test_a_model_that_is_not_made_of_whole_blocks_is_refused(tmp_path) -> None:
    save_model(tmp_path, "qwen3", tied=False)
    arch = dataclasses.replace(
        read_architecture(tmp_path),
        hidden_size=256,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=64,
        ffn_hidden_size=512,
    )
    fp8.check_fp8(arch, 1)
    fp8.check_fp8(arch, 2)
    with pytest.raises(ValueError, match=r"--rollout-fp8 .* 64 key rows on each rank of an engine"):
        fp8.check_fp8(arch, 4)
    with pytest.raises(ValueError, match=r"--rollout-fp8 .* 200 hidden size"):
        fp8.check_fp8(dataclasses.replace(arch, hidden_size=200), 1)
    with pytest.raises(ValueError, match="SGLang's Llama has no place for block scales"):
        fp8.check_fp8(dataclasses.replace(arch, family="llama"), 1)
