"""Hostile data sets, safetensors and names: an error that names the file, nothing executed, nothing written outside."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_table import FaultTable
from files.gadgets import Calls, saved

from megatron_fipo.data.build import eval_paths
from megatron_fipo.data.files import read_problem_file
from megatron_fipo.trainer.evaluation_report import file_name
from megatron_fipo.weights.hf_files import HFWeights

ROW = b'{"prompt": "1+1?", "label": "2"}\n'


def hostile_files(canary: Path) -> dict[str, bytes]:
    """By file name: what is no data set."""
    gadget = pickle.dumps(Calls(os.mkdir, str(canary)))
    array = io.BytesIO()
    np.save(array, np.array([Calls(os.mkdir, str(canary))], dtype=object), allow_pickle=True)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../evil.jsonl", ROW)
        file.writestr("/evil.jsonl", ROW)
        file.writestr("bomb.jsonl", bytes(2**22))
    kinds = {"pickle": gadget, "npy": array.getvalue(), "pt": saved(gadget), "zip": archive.getvalue()}
    found = {f"data.{kind}": content for kind, content in kinds.items()}
    for suffix in ("jsonl", "parquet"):
        found |= {f"{kind}.{suffix}": content for kind, content in kinds.items()}
    lines = {
        "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "digits": b'{"prompt": "?", "label": ' + b"9" * 5000 + b"}",
        "nan": b'{"prompt": "?", "label": NaN}',
        "infinity": b'{"prompt": "?", "label": -Infinity}',
        "huge": b'{"prompt": "?", "label": 1e999}',
        "surrogate": b'{"prompt": "\\ud800", "label": "1"}',
        "surrogate_label": b'{"prompt": "?", "label": "\\udfff"}',
        "latin": b'{"prompt": "\xff", "label": "1"}',
        "null": b"null",
        "list": b"[1]",
        "cut": b'{"prompt": "?", "lab',
        "nul": b"\0" * 100,
        "object_prompt": b'{"prompt": {"a": 1}, "label": "1"}',
        "bool_label": b'{"prompt": "?", "label": true}',
        "role": b'{"prompt": [{"role": "a/../../b", "content": "x"}], "label": "1"}',
    }
    return found | {f"{name}.jsonl": ROW + line + b"\n" for name, line in lines.items()}


def outcome_of(function: Callable[[], Any]) -> str:
    try:
        return f"read: {str(function())[:200]}"
    except ValueError as error:
        return f"refused: {error}"


def test_a_hostile_data_set_is_refused(tmp_path: Path, faults: FaultTable) -> None:
    canary = tmp_path / "canary"
    for name, content in hostile_files(canary).items():
        path = tmp_path / name
        path.write_bytes(content)
        before = sorted(tmp_path.rglob("*"))
        outcome = outcome_of(lambda path=path: read_problem_file("--prompt-data", str(path)).problems)
        ok = outcome.startswith("refused") and str(path) in outcome and sorted(tmp_path.rglob("*")) == before
        faults.record("hostile data", name, outcome[:300], ok)
        assert ok, (name, outcome)
    assert not canary.exists()


def safetensors(header: Any, data: bytes = b"", *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


HEADERS: dict[str, bytes] = {
    "a header of 2^63 bytes": safetensors(b"{}", size=2**63),
    "a header of 2^64 - 1 bytes": safetensors(b"{}", size=2**64 - 1),
    "a header longer than the file": safetensors(b"{}", size=1000),
    "a header of 200 MB": safetensors(b"{}", size=200 * 2**20),
    "no JSON": safetensors(b"not json"),
    "nested 100,000 deep": safetensors(b"[" * 100_000),
    "no UTF-8": safetensors(b'{"\xff": 1}'),
    "a list": safetensors([1]),
    "nothing": b"",
    "seven bytes": b"1234567",
    "overlapping": safetensors({"a": entry(), "b": entry(data_offsets=[4, 12])}, bytes(12)),
    "a gap": safetensors({"a": entry(), "b": entry(data_offsets=[16, 24])}, bytes(24)),
    "backwards": safetensors({"a": entry(data_offsets=[8, 0])}, bytes(8)),
    "negative": safetensors({"a": entry(data_offsets=[-8, 0])}, bytes(8)),
    "beyond the file": safetensors({"a": entry(data_offsets=[0, 800], shape=[200])}, bytes(8)),
    "offsets of 2^63": safetensors({"a": entry(data_offsets=[2**63, 2**63 + 8])}, bytes(8)),
    "a shape of 2^63": safetensors({"a": entry(shape=[2**63])}, bytes(8)),
    "a shape that overflows": safetensors({"a": entry(shape=[2**32, 2**32, 2])}, bytes(8)),
    "a negative shape": safetensors({"a": entry(shape=[-2])}, bytes(8)),
    "the wrong dtype": safetensors({"a": entry(dtype="F64")}, bytes(8)),
    "no dtype": safetensors({"a": entry(dtype="OBJECT")}, bytes(8)),
    "a quantised dtype": safetensors({"a": entry(dtype="I32")}, bytes(8)),
    "data nobody owns": safetensors({"a": entry()}, bytes(16)),
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_safetensors_file_is_refused(tmp_path: Path, faults: FaultTable, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[name])

    def read() -> Any:
        weights = HFWeights(tmp_path)
        return [weights.read(each) for each in weights.names]

    outcome = outcome_of(read)
    ok = outcome.startswith("refused") and str(path) in outcome
    faults.record("hostile safetensors", name, outcome[:300], ok)
    assert ok, outcome


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/outside.safetensors", "a\0b", "..", ".", "", "sub/../../outside", "\ud800", "x" * 300],
)
def test_an_index_leads_nowhere_else(tmp_path: Path, faults: FaultTable, name: str) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (tmp_path / "outside.safetensors").write_bytes(safetensors({"a": entry()}, bytes(8)))
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    outcome = outcome_of(lambda: HFWeights(directory).names)
    ok = outcome.startswith("refused") and str(directory) in outcome
    faults.record("hostile names", f"weight_map {name[:20]!r}", outcome[:300], ok)
    assert ok, outcome


NAMES = ["../x", "/etc/x", "a/b", "..", ".", "", "a\0b", "\ud800", "x" * 300, "~root", "\u202etxt", "é", "a\nb", " x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_data_set_s_name_stays_in_the_run_s_directory(tmp_path: Path, faults: FaultTable, name: str) -> None:
    outcome = outcome_of(lambda: eval_paths([f"{name}=data.jsonl"]))
    written = (tmp_path / f"step_000001_{file_name(name)}.md").absolute()
    inside = written.resolve().parent == tmp_path.resolve() and "\0" not in str(written)
    taken = [] if outcome.startswith("refused") else list(eval_paths([f"{name}=data.jsonl"]))
    ok = inside and len(written.name.encode(errors="replace")) < 256 and all("/" not in each for each in taken)
    faults.record("hostile names", f"data set {name[:20]!r}", outcome[:300], ok)
    assert ok, (outcome, written)


def test_a_data_set_on_disk_leads_nowhere_else(tmp_path: Path, faults: FaultTable) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list([{"prompt": "secret", "label": "1"}] * 3)
    whole.save_to_disk(str(tmp_path / "outside"))
    (arrow,) = (tmp_path / "outside").glob("*.arrow")
    for where in (f"../outside/{arrow.name}", str(arrow), f"./../outside/{arrow.name}"):
        directory = tmp_path / "inside"
        whole.save_to_disk(str(directory))
        state = json.loads((directory / "state.json").read_text())
        state["_data_files"] = [{"filename": where}]
        (directory / "state.json").write_text(json.dumps(state))
        outcome = outcome_of(lambda directory=directory: read_problem_file("--prompt-data", str(directory)).problems)
        ok = outcome.startswith("refused") and str(directory) in outcome
        faults.record("hostile names", f"a data set's file {where[:20]!r}", outcome[:300], ok)
        assert ok, outcome
