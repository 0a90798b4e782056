"""Hugging Face directories on disk: tensors read in pieces through memory mapping, written as a stream.

Knows files, names, shapes and dtypes; what a tensor means to Megatron is `mapping`'s affair.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_fipo.config import require
from megatron_fipo.weights.architecture import DTYPES, Architecture, hf_shapes, read_architecture
from megatron_fipo.weights.shard_writing import INDEX_NAME, SAFETENSORS_DTYPES, SINGLE_NAME, write_shards

EXPORT_RECEIPT = "export_receipt.json"
"""Lists the files of an export with their sizes: what may be replaced by the next export."""

CARRIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",  # tokenizer.4.0.0.json too, which tokenizer_config.json may name for a version of transformers
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.json",
    "*vocab*.txt",
    "merges.txt",
    "*.model",  # of sentencepiece: tokenizer.model, spiece.model, sentencepiece.bpe.model ...
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "byte_maps.json",
    "normalizer.json",
    "word_*.json",
    "prophetnet.tokenizer",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY.md",
)
"""What an export takes over from the model it started from, where it is there: among it every file that one of
transformers' tokenizers reads."""

IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # a buffer that old files carry
ROWS_PER_COMPARISON = 4096
MAX_NAME_LEN = 200  # of a file that an index names


class HFWeights:
    """The tensors of one Hugging Face directory, found by name and read on demand.

    Takes model.safetensors if it is there, as transformers does, else the shards of model.safetensors.index.json.
    Raises ValueError naming the file when there is neither, or when a file is missing, truncated or not what the index
    says. Tensors come in the file's dtype and may lie in its memory mapping: copy them before writing to them.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._path_of: dict[str, Path] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        self._open: tuple[Path, Any] | None = None
        for path in _find_files(self.directory):
            file = _open_safetensors(path)
            for name in file.keys():  # noqa: SIM118
                if name in self._path_of:
                    raise ValueError(f"{self.directory} holds the same tensor in several safetensors files")
                part = file.get_slice(name)
                self._path_of[name], self._headers[name] = path, (tuple(part.get_shape()), part.get_dtype())
        if not (self.directory / SINGLE_NAME).is_file():
            _check_index(self.directory / INDEX_NAME, self._path_of)

    @property
    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self._path_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ValueError if there is no such tensor, as all of these do."""
        return self._header(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """fp32, bf16 or fp16; anything else is quantised and raises ValueError."""
        found = self._header(name)[1]
        if found not in SAFETENSORS_DTYPES:
            raise ValueError(
                f"{self._path_of[name]}: {name} has dtype {found}, but must have one of {sorted(SAFETENSORS_DTYPES)}"
            )
        return SAFETENSORS_DTYPES[found]

    def dtype_name(self, name: str) -> str:
        """What safetensors calls the dtype, quantised ones among them."""
        return self._header(name)[1]

    def read_stored(self, name: str) -> Tensor:
        """The whole tensor, of whatever dtype it is stored in, a single number too."""
        return cast(Tensor, self._file(name).get_tensor(name))

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        self.dtype(name)
        return cast(Tensor, self._slice(name)[:])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive): dimension 0."""
        self._check_range(name, 0, start, stop)
        return cast(Tensor, self._slice(name)[start:stop])

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns `start` to `stop` (exclusive) of a matrix: dimension 1."""
        self._check_range(name, 1, start, stop)
        return cast(Tensor, self._slice(name)[:, start:stop])

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self._headers:
            raise ValueError(f"{self.directory}: no safetensors file holds {name}")
        return self._headers[name]

    def _slice(self, name: str) -> Any:
        return self._file(name).get_slice(name)

    def _file(self, name: str) -> Any:
        """Its file is mapped into memory until another one is read: what was read of a mapping stays with it."""
        self._header(name)
        path = self._path_of[name]
        if self._open is None or self._open[0] != path:
            self._open = None
            self._open = path, _open_safetensors(path)
        return self._open[1]

    def _check_range(self, name: str, dim: int, start: int, stop: int) -> None:
        self.dtype(name)
        shape = self.shape(name)
        if not (dim < len(shape) and 0 <= start < stop <= shape[dim]):
            raise ValueError(f"{self._path_of[name]}: {name} has shape {list(shape)}: no [{start}:{stop}] in dim {dim}")


def check_hf_shapes(arch: Architecture, weights: HFWeights) -> None:
    """Raise ValueError naming the directory unless it holds exactly the architecture's tensors in their shapes.

    Reads headers only, but for a tied model that carries lm_head.weight all the same: then it must equal the embedding.
    """
    experts = arch.num_layers * (arch.num_moe_experts or 0)
    for what, count in (("num_hidden_layers", arch.num_layers), ("num_hidden_layers x num_experts", experts)):
        known = f"at most the number of tensors in {weights.directory} ({len(weights.names)})"
        require(count <= len(weights.names), f"{weights.directory}/config.json: {what}", count, known)
    wanted, found = hf_shapes(arch), {name for name in weights.names if not IGNORED.fullmatch(name)}
    tied_extra = {"lm_head.weight"} & found if arch.tied else set()
    missing, unexpected = sorted(wanted.keys() - found), sorted(found - wanted.keys() - tied_extra)
    if missing:
        raise ValueError(f"{weights.directory} lacks tensors that its config.json asks for: {_first_few(missing)}")
    if unexpected:
        raise ValueError(
            f"{weights.directory} holds tensors that its config.json has no use for: {_first_few(unexpected)}"
        )
    wrong = [
        f"{name} is {list(weights.shape(name))} but must be {list(shape)}"
        for name, shape in wanted.items()
        if weights.shape(name) != shape
    ]
    if wrong:
        raise ValueError(f"{weights.directory} contradicts its config.json: {_first_few(wrong)}")
    for name in wanted:
        weights.dtype(name)
    if tied_extra and not _same_tensor(weights, "lm_head.weight", "model.embed_tokens.weight"):
        raise ValueError(
            f"{weights.directory}: lm_head.weight differs from model.embed_tokens.weight, "
            "but config.json has tie_word_embeddings true"
        )


def carried_files(hf_dir: str | Path) -> list[str]:
    """The files of `hf_dir` that belong to the model besides its weights: paths from there, sorted."""
    found = {path for pattern in CARRIED_FILES for path in Path(hf_dir).glob(pattern) if path.is_file()}
    return sorted(path.relative_to(hf_dir).as_posix() for path in found)


def carry_files(source_dir: str | Path, save_dir: str | Path) -> None:
    """Copy `carried_files` of the one directory to the other, which is there."""
    for name in carried_files(source_dir):
        (Path(save_dir) / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(source_dir) / name, Path(save_dir) / name)


def write_hf_checkpoint(
    save_dir: str | Path,
    source_dir: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write `tensors` as a Hugging Face directory that transformers loads bit-equal: `save_dir`.

    Streams: no tensor is held, so the producer may reuse its buffers. They are those of `source_dir`'s architecture, in
    any order, and share one dtype, which is entered in the copy of its config.json; tokenizer and generation config are
    copied as they are. Everything is written aside in the same parent and renamed at the end, so `save_dir` is never
    half-made; if `tensors` raises, it is untouched. An earlier export is replaced, an empty directory filled; any other
    directory, or an export with files added, raises ValueError, as do `source_dir` itself and what cannot be written.
    """
    save_dir, source_dir = Path(save_dir).absolute(), Path(source_dir).absolute()
    check_replaceable(save_dir, source_dir)
    shapes = hf_shapes(read_architecture(source_dir))
    aside = save_dir.with_name(f".{save_dir.name}.{os.getpid()}.partial")
    try:
        save_dir.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        dtype = write_shards(aside, tensors, shapes, max_shard_bytes=max_shard_bytes)
        carry_files(source_dir, aside)
        _set_config_dtype(aside / "config.json", dtype, source_dir)
        sizes = {name: (aside / name).stat().st_size for name in sorted(_entries(aside))}
        (aside / EXPORT_RECEIPT).write_text(json.dumps({"size_bytes": sizes}, indent=2) + "\n")
        _commit(aside, save_dir)
    except OSError as error:
        raise ValueError(f"the export directory {save_dir} cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        _end_replacement(aside, save_dir)


def _find_files(directory: Path) -> list[Path]:
    """The safetensors files to open."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory, but must be that of a Hugging Face model")
    if (directory / SINGLE_NAME).is_file():
        return [directory / SINGLE_NAME]
    index = directory / INDEX_NAME
    if not index.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        others = sorted(path.name for path in directory.glob("*.safetensors"))
        found = f"; {_first_few(pickles)}: pickles are not read, convert them to safetensors" if pickles else ""
        found = f", only {_first_few(others)}: shards need their index, adapters their model" if others else found
        raise ValueError(f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}{found}")
    names = sorted(set(_read_weight_map(index).values()))
    for name in names:
        if Path(name).name != name or len(name) > MAX_NAME_LEN or not (directory / name).is_file():
            raise ValueError(f"{index} names {name!r}, but {directory} has no such file")
    return [directory / name for name in names]


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{index} is not valid JSON: {error}") from None
    except (KeyError, TypeError):
        raise ValueError(f"{index} has no weight_map") from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: weight_map must be an object from tensor to file name")
    if not weight_map:
        raise ValueError(f"{index}: weight_map is empty")
    return weight_map


def _check_index(index: Path, path_of: dict[str, Path]) -> None:
    """Raise ValueError unless the index and the shards' headers say the same."""
    weight_map = _read_weight_map(index)
    for name in sorted(weight_map.keys() | path_of.keys()):
        found = path_of[name].name if name in path_of else None
        if found != weight_map.get(name):
            raise ValueError(f"{index} says that {name} lies in {weight_map.get(name)}, but it lies in {found}")


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise ValueError(f"{path} ({size} bytes) is not a whole safetensors file: {error}") from None
    except (RuntimeError, MemoryError) as error:  # torch's mapping, which may be written to, and safetensors' own
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) is more than this machine's memory can map: {error}") from None


def _first_few(items: Sequence[str]) -> str:
    more = f" and {len(items) - 8} more" if len(items) > 8 else ""
    return ", ".join(items[:8]) + more


def _same_tensor(weights: HFWeights, one: str, other: str) -> bool:
    """Whether two tensors are bit-equal, compared a piece at a time."""
    shape = weights.shape(one)
    if weights.shape(other) != shape or weights.dtype(one) != weights.dtype(other):
        return False
    for start in range(0, shape[0], ROWS_PER_COMPARISON):
        stop = min(start + ROWS_PER_COMPARISON, shape[0])
        if not torch.equal(weights.read_rows(one, start, stop), weights.read_rows(other, start, stop)):
            return False
    return True


def check_replaceable(save_dir: Path, source_dir: Path) -> None:
    """Raise ValueError unless `save_dir` is absent, empty, or an export with nothing added."""
    if not (source_dir / "config.json").is_file():
        raise ValueError(f"{source_dir} has no config.json to export along with the weights")
    if save_dir.resolve() == source_dir.resolve():
        raise ValueError(f"the export directory is {save_dir}, but must not be that of the model it started from")
    if not save_dir.exists():
        return
    if not save_dir.is_dir() or save_dir.is_symlink():
        raise ValueError(f"the export directory {save_dir} is a file or link, but must be a directory or absent")
    foreign = sorted(_entries(save_dir) - _files_of_export(save_dir))
    if foreign:
        raise ValueError(
            f"the export directory {save_dir} holds {_first_few(foreign)}, "
            "but must be absent, empty or an earlier export with nothing added or changed since"
        )


def _entries(directory: Path) -> set[str]:
    """Everything in it but directories that hold something: paths from there."""
    found = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir() or not any(path.iterdir()))
    return {path.relative_to(directory).as_posix() for path in found}


def _files_of_export(directory: Path) -> set[str]:
    """The files that an earlier export's receipt lists and that are as large, and no newer; the receipt itself."""
    receipt = directory / EXPORT_RECEIPT
    if not receipt.is_file():
        return set()
    try:
        sizes = dict(json.loads(receipt.read_text(encoding="utf-8"))["size_bytes"])
        found = {name: (directory / name).stat() for name in sizes if (directory / name).is_file()}
        end = receipt.stat().st_mtime_ns
        same = {name for name, at in found.items() if at.st_size == sizes[name] and at.st_mtime_ns <= end}
        return {*same, receipt.name}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{receipt} is not the receipt of an export: remove it with its directory") from None


def _set_config_dtype(path: Path, dtype: torch.dtype, source_dir: Path) -> None:
    """Make config.json name the exported dtype: transformers would cast the weights to another one. One that names none
    may stay so where the weights beside it have that dtype too."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) is None and _dtypes_in(source_dir) == {dtype}:
        return
    name = next(name for name, known in DTYPES.items() if known == dtype)
    if config.get(key) != name:
        path.write_text(json.dumps(config | {key: name}, indent=2) + "\n", encoding="utf-8")


def _dtypes_in(directory: Path) -> set[torch.dtype]:
    """Of the tensors in `directory`; none where it holds no model that could be read, only a configuration."""
    try:
        weights = HFWeights(directory)
        return {weights.dtype(name) for name in weights.names if not IGNORED.fullmatch(name)}
    except ValueError:
        return set()


def _commit(aside: Path, save_dir: Path) -> None:
    """Put `aside` in the place of `save_dir`."""
    for path in aside.rglob("*"):
        sync_to_disk(path)
    if save_dir.exists():
        save_dir.rename(aside.with_suffix(".replaced"))
    aside.rename(save_dir)
    sync_to_disk(save_dir.parent)


def _end_replacement(aside: Path, save_dir: Path) -> None:
    """The earlier export goes when another has its name, and gets it back when none has, however this came about."""
    replaced = aside.with_suffix(".replaced")
    if save_dir.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.exists():
        replaced.rename(save_dir)


def sync_to_disk(path: Path) -> None:
    """Return when what the file, or the list of the directory, holds is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
