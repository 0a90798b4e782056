"""The actor leaves the device and comes back: its tensors' memory is given up while the tensors themselves stay.

megatron-core has such calls of its own, for its buffers and its optimizer. The optimizer's give every tensor a new
memory, after which fp32 parameters and the optimizer's shards of them are no longer one; the buffers' keep no
gradients and lose parameters that share their memory with gradients. So memory is moved here, storage by storage: one
storage is emptied and filled again once, however many parameters, shards and buckets are views of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_fipo.actor.fp8_scaling import drop_quantised_weights
from megatron_fipo.actor.model import gather_parameters
from megatron_fipo.actor.owned_tensors import gradients_of, optimizer_state, parameters_of

Part = Literal["parameters", "gradients", "optimizer"]
PARTS: tuple[Part, ...] = ("parameters", "gradients", "optimizer")

# Pinned memory is handed out in powers of two: whole pieces of this size waste none of it.
PIECE_BYTES = 256 * 2**20


class Offloader:
    """Moves this rank's parameters, gradients and optimizer state between the device and main memory, bit for bit.

    Works on any device, the CPU too. Gradients are dropped, and come back as zeros, unless `keep_gradients`: an update
    begins by clearing them. Main memory is pinned on a GPU, and kept from one turn to the next. It holds what is away
    beside what lives in main memory anyway (reference weights, an optimizer on the CPU), which is not touched.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        device: torch.device,
        *,
        keep_gradients: bool = False,
    ) -> None:
        """ValueError where parameters or optimizer have memory that cannot be given up and taken again."""
        _require_movable(chunks, optimizer)
        self._chunks = chunks
        self._optimizer = optimizer
        self._device = device
        self._keep_gradients = keep_gradients
        self._memory: dict[Part, _MainMemory] = {part: _MainMemory(pinned=device.type == "cuda") for part in PARTS}
        self._away: dict[Part, list[_Away]] = {}

    @property
    def away(self) -> tuple[Part, ...]:
        """What has left and not come back."""
        return tuple(part for part in PARTS if part in self._away)

    @property
    def bytes_away(self) -> int:
        """Device memory given up by what is away."""
        return sum(one.size_bytes for tensors in self._away.values() for one in tensors)

    def leave(self, *parts: Part) -> int:
        """Give up the device memory of these parts; what is away already stays away. Returns the bytes given up.

        When main memory does not suffice, nothing has changed. Collective over all ranks where Megatron overlaps the
        gathering of parameters: it is waited for.
        """
        leaving = [part for part in parts if part not in self._away]
        if not leaving:
            return 0
        if "parameters" in leaving:
            gather_parameters(self._chunks)
            drop_quantised_weights(self._chunks)
        _wait(self._device)
        storages = self._storages()
        shared = [part for part in leaving for storage in storages[part] if not storage.resizable()]
        assert not shared, f"memory of {', '.join(sorted(set(shared)))} is shared with NumPy or another process"
        moved = {part: self._copied(part, storages[part]) for part in leaving}
        _wait(self._device)
        for part, tensors in moved.items():
            self._away[part] = tensors
            for one in tensors:
                one.storage.resize_(0)
        _give_back_what_is_unused(self._device)
        return sum(one.size_bytes for tensors in moved.values() for one in tensors)

    def enter(self, *parts: Part) -> int:
        """Take device memory for these parts and fill it with what left. Returns the bytes taken."""
        num_bytes = 0
        _give_back_what_is_unused(self._device)
        for part in parts:
            memory = self._memory[part]
            for one in self._away.get(part, ()):
                one.storage.resize_(one.size_bytes)
                if one.start is None:
                    _as_bytes(one.storage).zero_()
                else:
                    memory.read(one.start, _as_bytes(one.storage))
                num_bytes += one.size_bytes
            _wait(self._device)
            if self._away.pop(part, None) is not None and not memory.pinned:
                self._memory[part] = _MainMemory(pinned=False)  # plain memory costs nothing to get again
        return num_bytes

    def _copied(self, part: Part, storages: list[torch.UntypedStorage]) -> list[_Away]:
        """Copy storages to main memory, one after the other; gradients that are not kept are only measured."""
        if part == "gradients" and not self._keep_gradients:
            return [_Away(storage, storage.nbytes(), None) for storage in storages]
        memory = self._memory[part]
        memory.reserve(sum(storage.nbytes() for storage in storages))
        copied: list[_Away] = []
        start = 0
        for storage in storages:
            memory.write(start, _as_bytes(storage))
            copied.append(_Away(storage, storage.nbytes(), start))
            start += storage.nbytes()
        return copied

    def _storages(self) -> dict[Part, list[torch.UntypedStorage]]:
        """The storages on the device by part. One that several parts share belongs to the first of them: fp32
        parameters are their own masters, and MXFP8's buffer holds parameters and gradients in turn."""
        owned: dict[Part, Iterator[Tensor]] = {
            "parameters": parameters_of(self._chunks),
            "gradients": gradients_of(self._chunks, self._optimizer),
            "optimizer": optimizer_state(self._optimizer),
        }
        found: dict[Part, list[torch.UntypedStorage]] = {part: [] for part in PARTS}
        seen: set[int] = set()
        for part in PARTS:
            for tensor in owned[part]:
                storage = tensor.untyped_storage()
                if tensor.device.type == self._device.type and storage._cdata not in seen:
                    seen.add(storage._cdata)
                    found[part].append(storage)
        return found


class _Away:
    """A storage that was emptied, and where in main memory its bytes are; `start` None: nowhere."""

    def __init__(self, storage: torch.UntypedStorage, size_bytes: int, start: int | None) -> None:
        self.storage = storage
        self.size_bytes = size_bytes
        self.start = start


class _MainMemory:
    """Main memory as one row of bytes, in pieces."""

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._pieces: list[Tensor] = []  # [size] uint8 each

    def reserve(self, num_bytes: int) -> None:
        missing = num_bytes - sum(len(piece) for piece in self._pieces)
        while missing > 0:
            size = PIECE_BYTES if self.pinned else min(PIECE_BYTES, missing)
            self._pieces.append(torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned))
            missing -= size

    def write(self, start: int, flat: Tensor) -> None:
        for kept, part in self._spans(start, flat):
            kept.copy_(part, non_blocking=True)

    def read(self, start: int, flat: Tensor) -> None:
        for kept, part in self._spans(start, flat):
            part.copy_(kept, non_blocking=True)

    def _spans(self, start: int, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes `start`.. of the row beside the bytes of `flat` that belong there, piece by piece."""
        end = start + len(flat)
        piece_start = 0
        for piece in self._pieces:
            low, high = max(start, piece_start), min(end, piece_start + len(piece))
            if low < high:
                yield piece[low - piece_start : high - piece_start], flat[low - start : high - start]
            piece_start += len(piece)
        assert end <= piece_start, (start, end, piece_start)


def _require_movable(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if getattr(optimizer.config, name) == torch.uint8:
            raise ValueError(
                f"--{name.replace('_', '-')} is fp8, which Transformer Engine's Adam keeps in tensors of its own that "
                "cannot leave the GPU while engines generate: use fp16 or bf16, or --no-offload-trainer"
            )
    for chunk in chunks:
        if getattr(chunk.ddp_config, "nccl_ub", False):
            raise ValueError(
                "--use-nccl-ub registers the memory of parameters and gradients with NCCL, which cannot leave the GPU "
                "while engines generate: leave it out, or use --no-offload-trainer"
            )
        if any(type(parameter.data) is not Tensor for parameter in chunk.parameters()):
            raise ValueError(
                "--fp8-param-gather keeps parameters in several tensors each, which cannot leave the GPU while engines "
                "generate: leave it out, or use --no-offload-trainer"
            )


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    """A storage as a [size_bytes] uint8 tensor."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))


def _give_back_what_is_unused(device: torch.device) -> None:
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB a stream on Hopper, in segments that are free otherwise
        torch.cuda.ipc_collect()  # buckets that an engine let go of later than we did
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
