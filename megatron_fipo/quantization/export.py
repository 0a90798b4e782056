"""Writes a simulated model as the Hugging Face directory that SGLang loads: its tensors, its configs, its tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_fipo.quantization.formats import ALIGNMENT, FP8_MAX, Format
from megatron_fipo.quantization.packing import pack_awq
from megatron_fipo.quantization.simulation import INT4_MAX, QuantisedWeight, quantised_weights, quiet
from megatron_fipo.weights.architecture import DTYPES
from megatron_fipo.weights.hf_files import carry_files

REPORT_NAME = "quantization_report.json"


def check_absent(save_dir: Path) -> None:
    """Raise ValueError unless `save_dir` is absent or an empty directory, and could be written."""
    if save_dir == Path():
        raise ValueError("--save is '' or the working directory, but must be a directory of its own")
    if save_dir.is_symlink() or (save_dir.exists() and not save_dir.is_dir()):
        raise ValueError(f"--save is {str(save_dir)!r}, a file or link, but must be a directory or absent")
    if save_dir.is_dir() and any(save_dir.iterdir()):
        raise ValueError(f"--save is {str(save_dir)!r}, which is not empty, but must be an empty directory or absent")
    existing = next(parent for parent in save_dir.absolute().parents if os.path.lexists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--save is {str(save_dir)!r}, but {str(existing)!r} is no directory that can be written")


def write_quantised(
    save_dir: Path,
    source_dir: Path,
    model: Any,
    quant_format: Format,
    group_size: int | None,
    stored: torch.dtype,
    report: dict[str, Any],
    *,
    max_shard_bytes: int,
) -> None:
    """Write the simulated `model` to `save_dir`, with tokenizer and generation config of `source_dir`.

    All is written aside in the same parent and renamed at the end. Raises ValueError when it cannot be written.
    """
    from huggingface_hub import save_torch_state_dict

    save_dir = save_dir.absolute()
    check_absent(save_dir)
    aside = save_dir.with_name(f".{save_dir.name}.{os.getpid()}.partial")
    tensors = dict(exported_tensors(model, quant_format, group_size, stored))
    quant_config, file_config = quantisation_configs(model, quant_format, group_size)
    try:
        save_dir.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        carry_files(source_dir, aside)
        save_torch_state_dict(tensors, aside, max_shard_size=max_shard_bytes, metadata={"format": "pt"})
        config = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config |= {key: next(name for name, dtype in DTYPES.items() if dtype == stored)}
        _write_json(aside / "config.json", config | {"quantization_config": quant_config})
        if file_config is not None:
            _write_json(aside / "hf_quant_config.json", file_config)
        _write_json(aside / REPORT_NAME, report)
        for path in aside.glob("*.safetensors"):
            path.chmod(0o666 & ~_umask())  # safetensors makes its files private
        if save_dir.is_dir():
            save_dir.rmdir()
        aside.rename(save_dir)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--save {str(save_dir)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@torch.no_grad()
def exported_tensors(
    model: Any, quant_format: Format, group_size: int | None, stored: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that the file holds. A tied output layer is left out, as SGLang wants it."""
    done = set()
    for quantised in quantised_weights(model):
        done.add(f"{quantised.name}.weight")
        for suffix, tensor in _packed(quantised, quant_format, group_size, stored).items():
            yield f"{quantised.name}.{suffix}", tensor.to("cpu").contiguous()
    for name, parameter in model.named_parameters():  # a tied output layer is no parameter of its own
        if name not in done and ".experts." not in name:
            yield name, parameter.detach().to("cpu", stored).contiguous()


def quantisation_configs(
    model: Any, quant_format: Format, group_size: int | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """config.json's `quantization_config`, and hf_quant_config.json (None: the format has none)."""
    if quant_format == "int4-awq":
        awq = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group_size, "zero_point": True}
        return awq | {"modules_to_not_convert": ["lm_head"]}, None
    with quiet():
        from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
        from modelopt.torch.export.quant_utils import get_quant_config

        file_config = get_quant_config(model)
        return convert_hf_quant_config_format(file_config), file_config


def _packed(
    quantised: QuantisedWeight, quant_format: Format, group_size: int | None, stored: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of one weight by the last part of their names."""
    if quant_format == "int4-awq":
        assert group_size is not None
        return _packed_awq(quantised, group_size, stored)
    input_scale = (quantised.input_quantizer.amax.float() / FP8_MAX).reshape(())
    if quant_format == "fp8":
        scale = 1 / (FP8_MAX / quantised.weight_quantizer.amax.float().reshape(()))  # in the simulation's own order
        codes = (quantised.simulated().float() / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale, "input_scale": input_scale}
    return _packed_nvfp4(quantised)


def _packed_awq(quantised: QuantisedWeight, group_size: int, stored: torch.dtype) -> dict[str, Tensor]:
    num_rows = quantised.weight.shape[0]
    scales = (quantised.weight_quantizer.amax.float() / INT4_MAX).to(stored).reshape(num_rows, -1)
    scales = torch.where(scales > 0, scales, 1)  # a group of zeros
    steps = scales.float().repeat_interleave(group_size, 1)
    return pack_awq((quantised.simulated().float() / steps).round(), scales)


def _packed_nvfp4(quantised: QuantisedWeight) -> dict[str, Tensor]:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    scale_2 = NVFP4QTensor.get_weights_scaling_factor_2_from_quantizer(quantised.weight_quantizer)
    scale = NVFP4QTensor.get_weights_scaling_factor(quantised.weight, ALIGNMENT, scale_2)[0]
    codes = NVFP4QTensor.quantize(quantised.weight, ALIGNMENT, scale, scale_2)[0]
    return {
        "weight": codes._quantized_data,
        "weight_scale": scale,
        "weight_scale_2": scale_2.float().reshape(()),
        "input_scale": NVFP4QTensor.get_activation_scaling_factor(quantised.input_quantizer).float().reshape(()),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
