"""The Python path is the same on a CPU and on a GPU but for the lines that a list names, each with its reason."""

from __future__ import annotations

import ast
from pathlib import Path

from device_branches import ALLOWED, ANY_LINE, device_lines

PATCH_CALLS = {"apply_patches", "apply_sglang_cpu"}


def product(repo_root: Path) -> list[Path]:
    return [path for root in ("megatron_fipo", "patches") for path in sorted((repo_root / root).rglob("*.py"))]


def test_the_product_asks_for_the_device_only_where_the_list_says(repo_root: Path) -> None:
    found = {str(path.relative_to(repo_root)): list(device_lines(path)) for path in product(repo_root)}
    new = [
        f"{name}: {line}"
        for name, lines in found.items()
        for line in lines
        if line not in ALLOWED.get(name, {}) and ANY_LINE not in ALLOWED.get(name, {})
    ]
    assert not new, "asks what the device is, without a reason in tests/device_branches.py:\n" + "\n".join(new)
    gone = [f"{name}: {line}" for name, lines in ALLOWED.items() for line in lines if line != ANY_LINE]
    gone = [each for each in gone if each.partition(": ")[2] not in found.get(each.partition(": ")[0], [])]
    assert not gone, "no longer in the code:\n" + "\n".join(gone)
    assert all(found.get(name) for name in ALLOWED)


def test_a_line_that_asks_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    lines = [
        'a = 1 if device.type == "cpu" else 2',
        "b = tensor.is_cuda",
        "c = torch.cuda.current_stream()",
        'd = f(device_type != "cuda")',
        'e = "cuda" if flag else "cpu"',
    ]
    path.write_text("\n".join([*lines, 'f = torch.device("cuda")', 'g = name == "cpu"', "h = torch.cpu"]))
    assert list(device_lines(path)) == lines


def test_patches_are_applied_in_three_places_and_on_the_cpu_alone(repo_root: Path) -> None:
    """Every call in the product, and the condition that it stands under; what compares checkpoints runs on the CPU."""
    found = {}
    for path in product(repo_root):
        text = path.read_text()
        if not any(f"{name}(" in text for name in PATCH_CALLS):
            continue
        tree = ast.parse(text)
        conditions = {
            id(inner): ast.unparse(node.test)
            for node in ast.walk(tree)
            if isinstance(node, ast.If)
            for child in node.body
            for inner in ast.walk(child)
        }
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in PATCH_CALLS:
                found[str(path.relative_to(repo_root))] = conditions.get(id(call))
    assert found == {
        "megatron_fipo/run.py": "device.type == 'cpu'",
        "megatron_fipo/rollout/server.py": "use_cpu",
        "megatron_fipo/conversion_check.py": None,
    }
