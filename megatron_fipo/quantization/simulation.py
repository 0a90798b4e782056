"""Quantisation by nvidia-modelopt: calibrated on real activations, simulated in place, ready to be exported.

What SGLang will compute with is what is simulated: layers that it fuses share the scale it keeps for them, AWQ's
smoothing is folded into the weights before each layer, and scales are rounded to the precision they are stored in.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fipo.quantization.formats import FP8_MAX, Format

INT4_MAX = 7
NOT_INSTALLED = (
    "nvidia-modelopt is not installed: bash examples/setup_env.sh quantize installs it in .venv/quantize; put that on "
    "the PYTHONPATH"
)


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A linear layer's weight with its quantisers. `name` is the layer's in a Hugging Face file."""

    name: str
    weight: Tensor  # [N, K]
    weight_quantizer: Any
    input_quantizer: Any

    def simulated(self) -> Tensor:
        """[N, K]: what the quantised weight stands for, in the weight's own dtype."""
        simulated: Tensor = self.weight_quantizer(self.weight)
        return simulated


def require_modelopt() -> None:
    """Raise ValueError when nvidia-modelopt cannot be imported."""
    try:
        with quiet():
            import modelopt.torch.quantization  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"{NOT_INSTALLED} ({error})") from error


@torch.no_grad()
def quantise_model(
    model: Any,
    quant_format: Format,
    group_size: int | None,
    stored: torch.dtype,
    batches: Callable[[], Iterable[Tensor]],
) -> None:
    """Make the linear layers of `model` compute as quantised ones do; output layer, embedding and routers stay.

    `batches()` gives the token ids [B, L] to calibrate on, afresh at each call: AWQ reads them twice. `stored` is the
    dtype of what stays unquantised in the file, and of AWQ's scales. Raises ValueError for weights or activations that
    are not finite.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinite elements: it has no quantised form")
    with quiet():
        import modelopt.torch.quantization as mtq

        def calibrate(model: Any) -> None:
            for token_ids in batches():
                model(token_ids, use_cache=False)

        mtq.quantize(model, _config(quant_format, group_size), calibrate)
        if quant_format == "int4-awq":
            assert group_size is not None
            for layer in model.model.layers:
                _fold_smoothing(layer)
            for quantised in quantised_weights(model):
                _round_scales(quantised, group_size, stored)
        else:
            for layer in model.model.layers:
                _share_scales(layer)
            for quantised in quantised_weights(model):
                _give_range_to_zeros(quantised)
        for parameter in model.parameters():  # folding has made new ones
            if parameter.dim() == 1:
                parameter.copy_(parameter.to(stored))
    _check_finite(model)


def quantised_weights(model: nn.Module) -> Iterator[QuantisedWeight]:
    """All weights that are quantised. transformers fuses the experts of a layer: here they come one by one."""
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj_weight_quantizers"):
            yield from _experts(name, module)
        elif hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled:
            yield QuantisedWeight(name, module.weight, module.weight_quantizer, module.input_quantizer)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps modelopt's prints and its warnings to its own developers from the user."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _config(quant_format: Format, group_size: int | None) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq

    presets = {"fp8": mtq.FP8_DEFAULT_CFG, "int4-awq": mtq.INT4_AWQ_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}
    config: dict[str, Any] = copy.deepcopy(presets[quant_format])
    if quant_format == "int4-awq":
        weights = [entry for entry in config["quant_cfg"] if entry["quantizer_name"] == "*weight_quantizer"]
        assert len(weights) == 1, f"modelopt's INT4_AWQ_CFG has {len(weights)} entries for weights"
        weights[0]["cfg"]["block_sizes"][-1] = group_size
    return config


def _share_scales(layer: nn.Module) -> None:
    """One scale for the weights that SGLang keeps as one matrix: it would else quantise them again with the largest."""
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    attention, ffn = layer.self_attn, layer.mlp
    preprocess_linear_fusion([attention.q_proj, attention.k_proj, attention.v_proj])
    if not hasattr(ffn, "experts"):  # an expert's two have one quantiser
        preprocess_linear_fusion([ffn.gate_proj, ffn.up_proj])


def _give_range_to_zeros(quantised: QuantisedWeight) -> None:
    """A range for weights or inputs that are zero throughout, as in blocks added to a model: a scale of zero would make
    NaN of them."""
    for quantiser in (quantised.weight_quantizer, quantised.input_quantizer):
        if quantiser.amax is not None:
            quantiser.amax = torch.where(quantiser.amax == 0, FP8_MAX, quantiser.amax)


def _fold_smoothing(layer: nn.Module) -> None:
    """Put AWQ's factors on the inputs of a layer's linear maps into what comes before each: a norm, or the rows of
    another linear map. Where query heads share a value head, whose rows cannot take the factors of all of them, the
    attention's output is not smoothed: their mean was worse than none on SmolLM2-135M."""
    from modelopt.torch.export.quant_utils import fuse_prequant_layernorm, preprocess_linear_fusion

    attention, ffn = layer.self_attn, layer.mlp
    _fold_into_rows(ffn.down_proj, ffn.up_proj)
    if attention.o_proj.in_features == attention.v_proj.out_features:
        _fold_into_rows(attention.o_proj, attention.v_proj)
    else:
        attention.o_proj.weight.copy_(attention.o_proj.weight * _taken_factors(attention.o_proj))
    for norm, linears in (
        (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        (layer.post_attention_layernorm, [ffn.gate_proj, ffn.up_proj]),
    ):
        preprocess_linear_fusion(linears)
        fuse_prequant_layernorm(norm, linears)


def _fold_into_rows(linear: Any, before: Any) -> None:
    """Move the factors on the inputs of `linear` into the rows of `before` that make them."""
    factors = _taken_factors(linear)
    before.weight.copy_(before.weight * factors[:, None])
    if before.bias is not None:
        before.bias.copy_(before.bias * factors)


def _taken_factors(linear: Any) -> Tensor:
    """fp32 [K]: the factors on the inputs of `linear`, which has none from now on."""
    factors: Tensor = linear.input_quantizer.pre_quant_scale.float()
    del linear.input_quantizer._pre_quant_scale
    return factors


def _round_scales(quantised: QuantisedWeight, group_size: int, stored: torch.dtype) -> None:
    """The scale of each group, from the weights as they are now, in the precision it is stored in."""
    largest = quantised.weight.float().reshape(-1, group_size).abs().amax(1, keepdim=True)
    quantised.weight_quantizer.amax = (largest / INT4_MAX).to(stored).float() * INT4_MAX


def _experts(name: str, module: Any) -> Iterator[QuantisedWeight]:
    for i in range(module.num_experts):
        gate_up, down = module.gate_up_proj_weight_quantizers[i], module.down_proj_weight_quantizers[i]
        gate, up = module.gate_up_proj[i].chunk(2)
        yield QuantisedWeight(f"{name}.{i}.gate_proj", gate, gate_up, module.gate_up_proj_input_quantizer)
        yield QuantisedWeight(f"{name}.{i}.up_proj", up, gate_up, module.gate_up_proj_input_quantizer)
        yield QuantisedWeight(f"{name}.{i}.down_proj", module.down_proj[i], down, module.down_proj_input_quantizer)


def _check_finite(model: nn.Module) -> None:
    for quantised in quantised_weights(model):
        quantisers = (quantised.weight_quantizer, quantised.input_quantizer)
        for largest in (quantiser.amax for quantiser in quantisers if quantiser.is_enabled):
            if largest is None or not bool(largest.isfinite().all()):
                raise ValueError(f"{quantised.name}: calibration found no finite range of its weights and inputs")
