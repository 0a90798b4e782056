"""In what two directories of weights differ, tensor by tensor, whatever their forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_fipo.actor.inspection import find_any_checkpoint
from megatron_fipo.actor.megatron_weights import MegatronWeights
from megatron_fipo.actor.torch_dist_files import StoredTensors
from megatron_fipo.weights.architecture import Architecture, read_architecture, read_config
from megatron_fipo.weights.hf_files import IGNORED, HFWeights
from megatron_fipo.weights.stored_names import OPTIMIZER_KEY


@dataclass
class ModelDifference:
    """`shapes`: tensors that only one has, or has otherwise, with what is otherwise; `values`: max |delta|, where not
    zero."""

    num_compared: int = 0
    shapes: dict[str, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    @property
    def differs(self) -> bool:
        return bool(self.shapes or self.values)


def model_difference(
    one: str | Path,
    other: str | Path,
    hf_dir: str | Path | None = None,
    *,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> ModelDifference:
    """Compare the models in two directories: under Hugging Face names where one of them is such a model, or `hf_dir`
    is given, else under the keys of torch_dist. Raises ValueError for a directory that is neither."""
    paths = (Path(one), Path(other))
    of_hf = next((path for path in (*paths, *([Path(hf_dir)] if hf_dir else [])) if _is_hf(path)), None)
    are_alike = all(map(_is_hf, paths))  # then nothing is translated, and the models may be of any family
    arch = None if of_hf is None or are_alike else read_architecture(of_hf)
    first, second = (_names_and_source(path, arch) for path in paths)
    found = ModelDifference()
    names = sorted(first.names | second.names)
    for done, name in enumerate(names, start=1):
        if name not in first.names or name not in second.names:
            found.shapes[name] = f"only in {one if name in first.names else other}"
            continue
        tensors = [side.read(name) for side in (first, second)]
        found.num_compared += 1
        told = [f"{list(tensor.shape)} {tensor.dtype}" for tensor in tensors]
        if told[0] != told[1]:
            found.shapes[name] = " and ".join(told)
        if tensors[0].shape == tensors[1].shape and (delta := _largest_delta(*tensors)):
            found.values[name] = delta
        advance(done, len(names))
    return found


@dataclass(frozen=True)
class _Side:
    names: set[str]
    read: Callable[[str], Tensor]


def _names_and_source(path: Path, arch: Architecture | None) -> _Side:
    if _is_hf(path):
        weights, is_tied = HFWeights(path), read_config(path).get("tie_word_embeddings") is True
        superfluous = {name for name in weights.names if IGNORED.fullmatch(name)}
        superfluous |= {"lm_head.weight"} if is_tied else set()
        return _Side(set(weights.names) - superfluous, weights.read_stored)
    directory = find_any_checkpoint(path)
    if arch is not None:
        model = MegatronWeights(directory, arch)
        return _Side(set(model.names), model.read)
    stored = StoredTensors(directory)
    return _Side({key for key in stored.tensors if not OPTIMIZER_KEY.match(key)}, stored.read)


def _is_hf(path: Path) -> bool:
    return (path / "config.json").is_file()


def _largest_delta(one: Tensor, other: Tensor) -> float:
    """Infinity where exactly one of them is not a number."""
    if one.itemsize == 1 or other.itemsize == 1:  # FP8, for which torch cannot tell what is equal
        one, other = one.double(), other.double()
    if torch.equal(one, other):
        return 0.0
    delta = (one.double() - other.double()).abs()
    both = one.isnan() & other.isnan()
    return float(delta.nan_to_num(nan=float("inf"), posinf=float("inf")).masked_fill(both | (one == other), 0.0).max())
