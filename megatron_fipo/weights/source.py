"""Where weights come from, whatever the files: tensors under Hugging Face names, whole or in parts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class WeightSource(Protocol):
    """What the mapping reads from. Tensors may lie in a file's mapping: copy them before writing to them."""

    directory: Path

    @property
    def names(self) -> list[str]:
        """All tensors, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ValueError if there is no such tensor, as all of these do."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that reading gives."""

    def read(self, name: str) -> Tensor:
        """The whole tensor."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive): dimension 0."""

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns `start` to `stop` (exclusive) of a matrix: dimension 1."""


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds finite numbers alone, found without a copy of it."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.itemsize == 1:  # FP8, for which torch has no such reduction
        tensor = tensor.bfloat16()
    return all(math.isfinite(bound) for bound in tensor.aminmax())
