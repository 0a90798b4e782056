"""Files that anyone may have written are refused by their names; nothing in them is called, followed or blown up."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import pickletools
import socket
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_on_disk import reseal, save, torch_dist_files
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_fipo.actor.checkpoint_files import CheckpointError, find_checkpoint, read_run_state, verify_checkpoint
from megatron_fipo.actor.checkpoint_reading import load_tensors, read_json, read_tensors, require_no_object
from megatron_fipo.actor.metadata_pickle import parse_metadata

CLASSES = b"torch.distributed.checkpoint.metadata\n"


def metadata_with(change: Callable[[Any], object]) -> bytes:
    """torch's own file, changed."""
    metadata = pickle.loads(torch_dist_files()[".metadata"])
    change(metadata)
    return pickle.dumps(metadata)


def test_the_metadata_comes_out_as_torch_reads_it() -> None:
    content = torch_dist_files()[".metadata"]
    found, wanted = parse_metadata(content, ".metadata"), pickle.loads(content)
    assert found.state_dict_metadata == wanted.state_dict_metadata
    assert found.storage_data == wanted.storage_data
    place = found.storage_data[MetadataIndex("weight", torch.Size([0]))]
    assert (place.relative_path, place.offset) == ("__0_0.distcp", 0)


class Foreign:
    """What is made by calling."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.mkdir, "posix.mkdir"),
        (builtins.eval, "eval"),
        (getattr, "getattr"),
        (os.system, "posix.system"),
        (torch.load, "torch.serialization.load"),
        (bytearray, "bytearray"),
    ],
)
def test_a_foreign_function_is_named_and_not_called(
    tmp_path: Path, function: Callable[..., object], name: str, protocol: int
) -> None:
    target = tmp_path / "made"
    content = pickle.dumps({"state": Foreign(function, str(target))}, protocol=protocol)
    with pytest.raises(CheckpointError, match=r"^file holds .*" + name + ", which is no part"):
        parse_metadata(content, "file")
    assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"c" + CLASSES + b"Metadata\n)\x81}U\x0c__setstate__c" + CLASSES + b"Metadata\nsb.",
        b"\x80\x04c" + CLASSES + b"Metadata\nN}X\x01\x00\x00\x00xK\x01s\x86b.",  # an attribute of the class itself
        b"\x80\x04c" + CLASSES + b"MetadataIndex\n)\x81}X\x09\x00\x00\x00__class__K\x01sb.",
        b"\x80\x04c" + CLASSES + b"Metadata\n)R.",
        b"\x80\x04c" + CLASSES + b"Metadata\n(K\x01K\x02t\x81.",
        b"\x80\x04c" + CLASSES + b"Metadata\n)\x81.",
        b"\x80\x04ctorch\nSize\nc" + CLASSES + b"Metadata\n\x85R.",
        b"\x80\x04ctorch\nSize\nM\xff\xff\x85\x85\x85R.",
        b"\x80\x04ctorch.serialization\n_get_layout\nX\x04\x00\x00\x00evil\x85R.",
        b"\x80\x04" + b"(" + b"K\x01" * 1000 + b"t.",
        b"\x80\x04" + b")" + b"\x85" * 100_000 + b".",  # nested a hundred thousand times
        b"\x80\x04}" + b")" + b"\x85" * 100_000 + b"K\x01s.",  # and hashed
        b"\x80\x04]" + b"]a" * 100_000 + b".",
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a memo of two thousand million places
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # a bytearray of a terabyte
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",
        b"\x80\x04P1\n.",
        b"\x80\x04\x82\x01.",
        b"\x80\x04(i__main__\nx\n.",
        b"\x80\x04h\x07.",
        b"\x80\x04.",
        b"\x80\x04NN.",
        b"0.",
        b"",
        b"I" + b"9" * 100_000 + b"\n.",
    ],
)
def test_no_trick_of_the_pickle_language_works(content: bytes) -> None:
    classes = {name: dict(vars(kind)) for name, kind in _classes().items()}
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"^file "):
        parse_metadata(content, "file")
    assert time.process_time() - started < 20
    assert {name: dict(vars(kind)) for name, kind in _classes().items()} == classes


def _classes() -> dict[str, type]:
    from torch.distributed.checkpoint import filesystem, metadata

    return {
        name: kind for module in (metadata, filesystem) for name, kind in vars(module).items() if isinstance(kind, type)
    }


@pytest.mark.parametrize(
    "path",
    [
        "../../x.distcp",
        "/etc/passwd",
        "__0_0.distcp\x00",
        "__0_0.DISTCP",
        "__0_0.distcp/../x",
        "",
        "__\u0660_0.distcp",
        "__0_0.distcp\n",
    ],
)
def test_a_shard_elsewhere_is_refused_by_name(path: str) -> None:
    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = path

    with pytest.raises(CheckpointError, match="which is no shard beside it") as raised:
        parse_metadata(metadata_with(change), "file")
    assert str(raised.value).isprintable()


def _tensor(metadata: Any) -> TensorStorageMetadata:
    return metadata.state_dict_metadata["weight"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: _tensor(m).chunks.clear(),
        lambda m: _tensor(m).chunks.append(_tensor(m).chunks[0]),
        lambda m: vars(_tensor(m).chunks[0]).update(sizes=torch.Size([65])),
        lambda m: vars(_tensor(m).chunks[0]).update(offsets=torch.Size([1])),
        lambda m: vars(_tensor(m).chunks[0]).update(sizes=(64,)),
        lambda m: vars(_tensor(m)).update(size=torch.Size([-64])),
        lambda m: vars(_tensor(m)).update(size=torch.Size([2**62])),
        lambda m: m.storage_data.clear(),
        lambda m: m.storage_data.update({"weight": 1}),
        lambda m: [vars(place).update(offset=-1) for place in m.storage_data.values()],
        lambda m: [vars(place).update(length=True) for place in m.storage_data.values()],
        lambda m: [vars(place).update(transform_descriptors=["zstd"]) for place in m.storage_data.values()],
        lambda m: m.state_dict_metadata.update(weight=3),
        lambda m: vars(m).update(extra=1),
        lambda m: vars(m).update(storage_data=None),
        lambda m: vars(m).pop("state_dict_metadata"),
    ],
)
def test_a_description_that_does_not_hold_together_is_refused(change: Callable[[Any], object]) -> None:
    with pytest.raises(CheckpointError, match=r"^file "):
        parse_metadata(metadata_with(change), "file")


def test_bytes_in_the_description_stay_bytes() -> None:
    found = parse_metadata(metadata_with(lambda m: m.state_dict_metadata.update(x=BytesStorageMetadata())), "file")
    assert type(found.state_dict_metadata["x"]) is BytesStorageMetadata


def make_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


@pytest.mark.parametrize("name", ["rng_0.pt", ".metadata", "run_state.json", "manifest.json", "__0_0.distcp"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: path.symlink_to("/etc/hostname"), "a symbolic link"),
        (lambda path: path.symlink_to(path.with_name("nowhere")), "a symbolic link"),
        (os.mkfifo, "a pipe"),
        (Path.mkdir, "a directory"),
        (make_socket, "a socket"),
    ],
)
def test_what_is_no_regular_file_is_refused_by_name_and_not_waited_for(
    tmp_path: Path, name: str, make: Callable[[Path], object], kind: str
) -> None:
    directory = save(tmp_path, 1)
    (directory / name).unlink()
    make(directory / name)
    with pytest.raises(CheckpointError) as raised:
        verify_checkpoint(directory)
    assert f"{directory / name} is {kind}, not a regular file" in str(raised.value)


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/hostname", "a\x00b", "RNG_0.pt", "rng_0.pt ", "rng_\uff10.pt", "x/rng_0.pt", "", "\u202egnr",
     "__0_0.distcp\n", "manifest.json"],
)  # fmt: skip
def test_a_foreign_name_in_the_manifest_is_refused_and_not_opened(tmp_path: Path, name: str) -> None:
    directory = save(tmp_path, 1)
    (tmp_path / "outside").write_text("x")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name] = {"size_bytes": 1, "sha256": "0" * 64}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest\.json lists .*, which is no file of a checkpoint") as raised:
        verify_checkpoint(directory)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", ["RNG_0.pt", "rng_0.pt\n", "\u202ex", "e\u0301", b"\xff\xfe", "rng_00.pt"])
def test_a_foreign_file_in_the_directory_is_refused_by_name(tmp_path: Path, name: str | bytes) -> None:
    directory = save(tmp_path, 1)
    with open(os.path.join(os.fsencode(directory), name if isinstance(name, bytes) else name.encode()), "wb"):
        pass
    with pytest.raises(CheckpointError, match="is not in the checkpoint's manifest") as raised:
        verify_checkpoint(directory)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "content",
    [
        "[" * 200_000,
        '{"files": ' + '{"a":' * 200_000,
        '{"files": {"rng_0.pt": 5}}',
        '{"files": {"rng_0.pt": {"size_bytes": true, "sha256": "x"}}}',
        '{"files": {"rng_0.pt": {"size_bytes": 1e3, "sha256": "x"}}}',
        '{"files": {}, "files": {}}',
        '{"files": {"rng_0.pt": {"size_bytes": ' + "9" * 10_000 + "}}}",
        '{"files": []}',
        "nul\x00l",
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, content: str | bytes) -> None:
    directory = save(tmp_path, 1)
    (directory / "manifest.json").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        verify_checkpoint(directory)


@pytest.mark.parametrize("change", [{"step": -1}, {"step": True}, {"step": "1"}, {"model": []}, {"layout": None}])
def test_a_run_state_of_another_kind_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    directory = save(tmp_path, 1)
    state = json.loads((directory / "run_state.json").read_text())
    (directory / "run_state.json").write_text(json.dumps({**state, **change}))
    reseal(directory)
    with pytest.raises(CheckpointError, match=r"run_state\.json says"):
        read_run_state(directory)


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, 1).rename(tmp_path / "step_0000002")
    with pytest.raises(CheckpointError, match=r"run_state\.json says step 1, which is not .*step_0000002's"):
        verify_checkpoint(directory)


@pytest.mark.parametrize("name", ["common.pt", "metadata.json", "__0_0.distcp", ".metadata", "run_state.json"])
def test_a_true_manifest_without_a_needed_file_is_refused(tmp_path: Path, name: str) -> None:
    directory = save(tmp_path, 1)
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json lists no " + name):
        verify_checkpoint(reseal(directory))


def test_a_true_manifest_without_a_ranks_random_state_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    state = json.loads((directory / "run_state.json").read_text())
    layout = {"tp": 2, "pp": 1, "cp": 1, "dp": 1}
    (directory / "run_state.json").write_text(json.dumps({**state, "layout": layout}))
    with pytest.raises(CheckpointError, match=r"manifest\.json lists no rng_1\.pt"):
        verify_checkpoint(reseal(directory))


def test_a_run_state_that_is_no_json_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    (directory / "run_state.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"run_state\.json cannot be read"):
        verify_checkpoint(reseal(directory))


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("other"), os.mkfifo, Path.mkdir])
def test_a_pointer_that_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    save(tmp_path, 1)
    (tmp_path / "other").write_text("step_0000001")
    (tmp_path / "latest").unlink()
    make(tmp_path / "latest")
    with pytest.raises(CheckpointError, match=r"latest is a .*, not a regular file"):
        find_checkpoint(tmp_path)


def test_a_save_follows_no_link_that_lies_in_its_way(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    root = tmp_path / "root"
    root.mkdir()
    (root / ".latest").symlink_to(outside / "file")
    (root / "latest").symlink_to(outside / "file")
    (root / ".writing_step_0000001").symlink_to(outside)
    (root / ".removing_step_0000001").symlink_to(outside)
    (root / "step_0000001").symlink_to(outside / "nowhere")
    assert save(root, 1).name == "step_0000001.1"
    verify_checkpoint(find_checkpoint(root))
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "mine"


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_plain_tensors_come_back(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(saved({"a": torch.arange(3), "b": [1.5, "c"]}))
    found = read_tensors(tmp_path / "x")
    assert found["a"].tolist() == [0, 1, 2]
    assert found["b"] == [1.5, "c"]


def test_compressed_or_foreign_archives_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target = tmp_path / "made"
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 10_000_000)
    contents = [
        (bomb.getvalue(), "is compressed"),
        (saved(Foreign(os.mkdir, str(target))), "cannot be read"),
        (pickle.dumps(Foreign(os.mkdir, str(target))), "cannot be read"),
        (saved({"a": 1})[:-40], "cannot be read"),
        (b"", "cannot be read"),
    ]
    for content, message in contents:
        with pytest.raises(CheckpointError, match="^file " + message) as raised:
            load_tensors(io.BytesIO(content), len(content), "file")
        assert "\n" not in str(raised.value)
    assert not target.exists()


def test_an_extra_state_must_be_empty() -> None:
    require_no_object(saved([None, torch.empty(0, dtype=torch.uint8)]), "state")
    with pytest.raises(CheckpointError, match=r"^state is an object that only unpickling could read"):
        require_no_object(saved([torch.ones(4, dtype=torch.uint8)]), "state")


def test_a_large_json_name_is_quoted_in_part(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"' + "a" * 100_000)
    with pytest.raises(CheckpointError) as raised:
        read_json(tmp_path / "x.json")
    assert len(str(raised.value)) < 1000


def test_torch_writes_no_more_of_the_pickle_language_than_is_read() -> None:
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(torch_dist_files()[".metadata"])}
    assert {"NEWOBJ", "BUILD", "REDUCE", "STACK_GLOBAL"} < opcodes
