"""Quantised checkpoints hold what modelopt simulated, in tensors that SGLang's own loader takes, every one of them."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_load import SENTINEL
from tiny_models import make_model
from torch import Tensor

from megatron_fipo.patches.sglang_cpu.plugin import ASKED_FOR
from megatron_fipo.quantization.checkpoint import load_model
from megatron_fipo.quantization.export import exported_tensors, write_quantised
from megatron_fipo.quantization.formats import Format
from megatron_fipo.quantization.packing import dequantise_awq, dequantise_fp8, dequantise_nvfp4, pack_awq
from megatron_fipo.quantization.quality import compare
from megatron_fipo.quantization.simulation import quantise_model, quantised_weights

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A tiny model in a format. SGLang's AWQ computes in fp16 alone where there is no CUDA."""

    family: str
    tied: bool
    quant_format: Format
    group_size: int | None = None
    engine_dtype: str = "bfloat16"
    method: str = "ModelOptFp8LinearMethod"


CASES = {
    "qwen2 fp8": Case("qwen2", True, "fp8"),
    "llama awq": Case("llama", False, "int4-awq", 32, "float16", "AWQLinearMethod"),
    "qwen2 awq": Case("qwen2", True, "int4-awq", 64, "float16", "AWQLinearMethod"),
    "qwen3 moe fp8": Case("qwen3_moe", False, "fp8"),
    # on a CPU it can be calibrated and written, but not simulated
    "qwen3 nvfp4": Case("qwen3", True, "nvfp4", None, "bfloat16", "ModelOptFp4LinearMethod"),
}


@dataclass(frozen=True, eq=False)
class Quantised:
    """A case's model before, its simulation, the tensors written, and what SGLang has after loading them."""

    case: Case
    model: Any
    tensors: dict[str, Tensor]
    loaded: dict[str, Any]

    def dequantised(self, name: str) -> Tensor:
        found = {
            key.removeprefix(f"{name}."): value for key, value in self.tensors.items() if key.startswith(f"{name}.")
        }
        return dequantise(self.case, {key: value for key, value in found.items() if key not in ("input_scale", "bias")})


def dequantise(case: Case, parts: dict[str, Tensor]) -> Tensor:
    by_format = {"fp8": dequantise_fp8, "int4-awq": dequantise_awq, "nvfp4": dequantise_nvfp4}
    return by_format[case.quant_format](**parts)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 131, (4, length), generator=generator) for length in (24, 9)]


def tiny(case: Case, directory: Path) -> Path:
    heads = {"head_dim": 16, "moe_intermediate_size": 64} if case.family == "qwen3_moe" else {}
    heads |= {"head_dim": 16} if case.family == "qwen3" else {}
    make_model(case.family, tied=case.tied, **SIZES, **heads).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Quantised]:
    """Every case; SGLang loads all of them in one process, since importing it changes transformers for everybody."""
    root = tmp_path_factory.mktemp("quantised")
    models, words = {}, []
    for i, (name, case) in enumerate(CASES.items()):
        source, target = tiny(case, root / f"{i}-source"), root / f"{i}"
        model = load_model(source, torch.bfloat16, CPU, bf16=False)
        quantise_model(model, case.quant_format, case.group_size, torch.bfloat16, batches)
        write_quantised(
            target, source, model, case.quant_format, case.group_size, torch.bfloat16, {}, max_shard_bytes=50_000
        )
        assert len(list(target.glob("*.safetensors"))) > 1
        models[name] = model
        words += [str(target), str(root / f"{i}.pt"), case.engine_dtype]
    package = "megatron_fipo.patches.sglang_cpu.models"
    settings = {ASKED_FOR: "1", "SGLANG_EXTERNAL_MODEL_PACKAGE": package, "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, str(Path(__file__).with_name("sglang_load.py")), *words]
    answer = subprocess.run(
        program, capture_output=True, text=True, check=False, env={**os.environ, **settings}, timeout=300
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return {
        name: Quantised(
            case,
            models[name],
            dict(exported_tensors(models[name], case.quant_format, case.group_size, torch.bfloat16)),
            torch.load(root / f"{i}.pt", weights_only=True),
        )
        for i, (name, case) in enumerate(CASES.items())
    }


@pytest.mark.parametrize("name", [name for name in CASES if "nvfp4" not in name])
def test_files_dequantise_to_exactly_what_was_simulated(name: str, quantised: dict[str, Quantised]) -> None:
    found = quantised[name]
    num_weights = 0
    for weight in quantised_weights(found.model):
        simulated, dequantised = weight.simulated(), found.dequantised(weight.name)
        if found.case.quant_format == "fp8":
            assert torch.equal(dequantised, simulated), weight.name
        else:  # the simulation divides where the file's reader multiplies
            torch.testing.assert_close(dequantised, simulated, rtol=2**-22, atol=0)
        assert 0.01 < (dequantised - weight.weight).abs().max() / weight.weight.abs().max() < 0.1
        num_weights += 1
    assert num_weights == (2 * 4 + 2 * 8 * 3 if found.case.family == "qwen3_moe" else 2 * 7)


def test_nvfp4_is_off_by_no_more_than_half_a_step_of_its_blocks(quantised: dict[str, Quantised]) -> None:
    found = quantised["qwen3 nvfp4"]
    for weight in quantised_weights(found.model):
        scale = found.tensors[f"{weight.name}.weight_scale"].float() * found.tensors[f"{weight.name}.weight_scale_2"]
        widest_step = 2.0 * scale.repeat_interleave(16, 1)  # between 4 and 6
        # the block's largest may lie beyond 6 steps by the rounding of the block's own FP8 scale
        error = (found.dequantised(weight.name) - weight.weight).abs()
        assert bool((error <= 0.6 * widest_step).all()), weight.name


@pytest.mark.parametrize("name", CASES)
def test_sglang_loads_every_tensor_into_a_quantised_model(name: str, quantised: dict[str, Quantised]) -> None:
    found = quantised[name]
    case, parameters, methods = found.case, found.loaded["parameters"], found.loaded["methods"]
    assert (
        found.loaded["quantization"]
        == {"fp8": "modelopt_fp8", "int4-awq": "awq", "nvfp4": "modelopt_fp4"}[case.quant_format]
    )
    assert methods["model.layers.1.self_attn.qkv_proj"] == methods["model.layers.0.self_attn.o_proj"] == case.method
    for parameter, whole in parameters.items():
        is_padded = "embed_tokens" in parameter or "lm_head" in parameter
        tensor = whole[:131] if is_padded else whole  # of the vocabulary
        if tensor.dtype.is_floating_point:
            assert not bool(tensor.float().isnan().any()), parameter
        else:
            assert not bool((tensor == SENTINEL).all()), parameter
    assert_holds(parameters, found)


def assert_holds(parameters: dict[str, Tensor], found: Quantised) -> None:
    """What SGLang fused, taken apart, is what the files say: nothing is lost, swapped or cast on the way."""
    cut = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for layer in range(2):
        for fused in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            prefix, _, last = f"model.layers.{layer}.{fused}".rpartition(".")
            if f"{prefix}.{last}.input_scale" not in parameters and f"{prefix}.{last}.qweight" not in parameters:
                continue  # of the experts
            parts = {
                key.removeprefix(f"{prefix}.{last}."): value
                for key, value in parameters.items()
                if key.startswith(f"{prefix}.{last}.")
            }
            parts.pop("bias", None)
            for scale in ("input_scale", "weight_scale", "weight_scale_2"):  # one for each of what is fused: all alike
                if scale in parts and parts[scale].dtype == torch.float32:
                    assert len(set(parts[scale].tolist())) == 1, (layer, fused, scale)
                    parts[scale] = parts[scale][0]
            inputs = [found.tensors.get(f"{prefix}.{name}.input_scale") for name in cut.get(last, (last,))]
            assert all(value is None or value == parts["input_scale"] for value in inputs)
            parts.pop("input_scale", None)
            whole = torch.cat([found.dequantised(f"{prefix}.{name}") for name in cut.get(last, (last,))])
            assert torch.equal(dequantise(found.case, parts), whole), (layer, fused)


def test_sglang_keeps_router_and_output_layer_and_finds_every_expert(quantised: dict[str, Quantised]) -> None:
    found = quantised["qwen3 moe fp8"]
    methods, parameters = found.loaded["methods"], found.loaded["parameters"]
    assert methods["model.layers.0.mlp.gate"] == methods["lm_head"] == "UnquantizedLinearMethod"
    assert methods["model.layers.1.mlp.experts"] == "ModelOptFp8MoEMethod"
    assert torch.equal(parameters["lm_head.weight"][:131], found.tensors["lm_head.weight"])
    assert torch.equal(parameters["model.layers.0.mlp.gate.weight"], found.tensors["model.layers.0.mlp.gate.weight"])
    name = "model.layers.1.mlp.experts"
    for expert in range(8):
        gate, up = (found.tensors[f"{name}.{expert}.{which}_proj.weight"] for which in ("gate", "up"))
        assert torch.equal(parameters[f"{name}.w13_weight"][expert].float(), torch.cat([gate, up]).float())
        down = found.tensors[f"{name}.{expert}.down_proj.weight_scale"]
        assert parameters[f"{name}.w2_weight_scale"][expert] == down


@pytest.mark.parametrize("num_key_value_heads", [2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_folding_the_smoothing_changes_nothing_as_long_as_nothing_is_quantised(
    family: str, num_key_value_heads: int
) -> None:
    original = make_model(family, tied=False, num_key_value_heads=num_key_value_heads, **SIZES)
    model = copy.deepcopy(original)
    quantise_model(model, "int4-awq", 32, torch.float32, batches)
    token_ids = batches()[0]
    with torch.no_grad():
        wanted, simulated = original(token_ids).logits, model(token_ids).logits
        assert 0.05 < (simulated - wanted).abs().max() < 3
        for weight in quantised_weights(model):
            weight.weight_quantizer.disable()
            assert not hasattr(weight.input_quantizer, "_pre_quant_scale"), weight.name
        torch.testing.assert_close(model(token_ids).logits, wanted, rtol=1e-4, atol=1e-4)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, original.get_parameter(n))]
    assert {"model.layers.0.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"} <= set(changed)
    # rounding aside, the output of attention is smoothed where no query heads share a value head
    unsmoothed = torch.allclose(
        model.model.layers[0].self_attn.o_proj.weight, original.model.layers[0].self_attn.o_proj.weight
    )
    assert unsmoothed == (num_key_value_heads == 2)


@pytest.mark.parametrize("quant_format", ["fp8", "int4-awq"])
def test_a_weight_that_is_no_number_is_named(quant_format: Format) -> None:
    model = make_model("llama", tied=True, **SIZES)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has NaN or infinite elements"):
        quantise_model(model, quant_format, 32 if quant_format == "int4-awq" else None, torch.bfloat16, batches)


@pytest.mark.parametrize("quant_format", ["fp8", "nvfp4"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_weights_and_inputs_that_are_all_zero_stay_zero(family: str, quant_format: Format) -> None:
    heads = {"head_dim": 16, "moe_intermediate_size": 32} if family == "qwen3_moe" else {}
    model = make_model(family, tied=True, **SIZES, **heads)
    layer, ffn = model.model.layers[1], "model.layers.1.mlp"
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        if family == "llama":
            layer.mlp.up_proj.weight.zero_()  # and so what down_proj is given
        else:
            layer.mlp.experts.down_proj[3].zero_()
    quantise_model(model, quant_format, None, torch.bfloat16, batches)
    found = dict(exported_tensors(model, quant_format, None, torch.bfloat16))
    for name, tensor in found.items():
        assert bool(tensor.float().isfinite().all()), name
        assert "scale" not in name or bool((tensor.float() > 0).all()), name
    zeros = [f"{ffn}.up_proj"] if family == "llama" else [f"{ffn}.experts.3.down_proj"]
    for name in ["model.layers.1.self_attn.o_proj", *zeros]:
        parts = [part for part in ("weight", "weight_scale", "weight_scale_2") if f"{name}.{part}" in found]
        whole = dequantise(Case(family, True, quant_format), {part: found[f"{name}.{part}"] for part in parts})
        assert not bool(whole.any()), name


def test_awq_codes_lie_where_the_kernels_look_for_them() -> None:
    codes = torch.arange(-8, 8).repeat(2, 1)  # [2, 16]: two of the eight columns of a packed row
    codes = torch.cat([codes, torch.zeros(6, 16, dtype=codes.dtype)])
    packed = pack_awq(codes, torch.ones(8, 1))
    assert packed["qweight"].shape == (16, 1)
    # column 0 in the lowest bits, column 1 in the fifth nibble; a code of 0 is 8
    assert packed["qweight"][0].item() & 0xFFFFFFFF == 0x88808880
    assert packed["qweight"][15].item() & 0xFFFFFFFF == 0x888F888F
    assert packed["qzeros"].item() & 0xFFFFFFFF == 0x88888888
    assert torch.equal(dequantise_awq(**packed), codes.float())


def test_what_is_measured_is_what_the_distributions_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_fipo.quantization.quality.ROWS_AT_ONCE", 7)
    before = make_model("llama", tied=True, **SIZES)
    after = make_model("llama", tied=True, seed=1, **SIZES)
    texts = batches()
    found = compare(before, after, texts)
    kl, same, num_tokens, worst = 0.0, 0, 0, 0.0
    losses = [0.0, 0.0]
    for row in (row for batch in texts for row in batch):
        with torch.no_grad():
            both = [model(row[None]).logits[0].double() for model in (before, after)]
        for i in range(len(row) - 1):
            p, q = (torch.distributions.Categorical(logits=logits[i]) for logits in both)
            kl += float(torch.distributions.kl_divergence(p, q))
            same += int(p.probs.argmax() == q.probs.argmax())
            losses = [loss - float(each.log_prob(row[i + 1])) for loss, each in zip(losses, (p, q), strict=True)]
            worst = max(worst, float((both[0][i] - both[1][i]).abs().max()))
            num_tokens += 1
    assert found.num_tokens == num_tokens == 4 * (24 + 9) - 8
    assert found.kl == pytest.approx(kl / num_tokens, rel=1e-5)
    assert found.same_likeliest == same / num_tokens
    assert found.max_logit_difference == pytest.approx(worst, rel=1e-5)
    perplexities = (found.perplexity_before, found.perplexity_after)
    assert perplexities == pytest.approx([math.exp(loss / num_tokens) for loss in losses], rel=1e-5)
