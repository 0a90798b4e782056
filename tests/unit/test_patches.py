"""What patches/ says of itself is true: README, size, and the upstream code that each patch was written against."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import check_patches

README = check_patches.PATCHES / "README.md"
MOST_LINES = 400


def test_the_readme_tells_what_the_patches_say() -> None:
    patches = check_patches.read_patches()
    assert len(patches) == 17
    assert check_patches.readme_table(patches) in README.read_text()


def test_patches_stay_small() -> None:
    for directory, name in (("megatron_cpu", "megatron-core"), ("sglang_cpu", "SGLang")):
        files = sorted((check_patches.PATCHES / directory).rglob("*.py"))
        lines = sum(check_patches.code_lines(path) for path in files)
        assert 0 < lines <= MOST_LINES
        assert f"{lines} for {name}" in README.read_text(), "the README gives another figure"


def test_lines_of_code_are_counted_without_comments_and_docstrings(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        '"""Doc\nstring."""\n\n# comment\nx = """a\nb"""  # counts\n\n\ndef f():\n    """Doc."""\n    return 1\n'
    )
    assert check_patches.code_lines(path) == 4


def test_the_installed_upstreams_are_those_the_patches_were_written_for() -> None:
    roots = {name: check_patches.installed_root(name) for name in check_patches.PACKAGES}
    found = [
        f"{patch.path.name}: {symbol} {found}"
        for patch in check_patches.read_patches()
        for symbol, wanted in patch.replaces.items()
        if (found := check_patches.status(roots[patch.upstream], symbol, wanted)) != "same"
    ]
    assert not found, "\n".join(found)


def test_every_patch_of_megatron_is_applied_and_has_a_row(repo_root: Path) -> None:
    rows = [line for line in README.read_text().splitlines() if line.startswith("| `megatron_cpu/")]
    applied = (repo_root / "patches" / "megatron_cpu" / "apply.py").read_text()
    for row in rows:
        name = row.split("`")[1].removeprefix("megatron_cpu/").removesuffix(".py")
        assert f'"{name}": {name}.apply' in applied


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    (tmp_path / "pkg" / "sub").mkdir(parents=True)
    (tmp_path / "pkg" / "sub" / "__init__.py").write_text(
        "try:\n    from a import b as c\nexcept ImportError:\n    c = None\n"
    )
    (tmp_path / "pkg" / "m.py").write_text(
        "class A:\n    def f(self):\n        '''Doc.'''\n        return 1  # why\n\n"
        "if x:\n    def g(): pass\nelse:\n    g = None\n"
        "y = torch.cuda.current_device()\n"
    )
    return tmp_path


def test_a_symbol_is_found_wherever_its_module_binds_it(upstream: Path) -> None:
    source = check_patches.symbol_source
    assert source(upstream, "pkg.m:A.f") == "def f(self):\n    return 1"
    assert source(upstream, "pkg.m:g") == "def g():\n    pass\ng = None"
    assert source(upstream, "pkg.sub:c") == "from a import b as c\nc = None"
    assert source(upstream, "pkg:torch.cuda") == "m.py: torch.cuda.current_device"
    for absent in ("pkg.m:A.g", "pkg.m:h", "pkg.n:g", "pkg.m:A.f.g"):
        assert source(upstream, absent) is None


def test_comments_and_layout_do_not_change_a_symbol_but_code_does(upstream: Path) -> None:
    wanted = check_patches.symbol_hash("def f(self):\n    return 1")
    assert check_patches.status(upstream, "pkg.m:A.f", wanted) == "same"
    path = upstream / "pkg" / "m.py"
    path.write_text(path.read_text().replace("return 1  # why", "return (1)"))
    assert check_patches.status(upstream, "pkg.m:A.f", wanted) == "same"
    path.write_text(path.read_text().replace("return (1)", "return 2"))
    assert check_patches.status(upstream, "pkg.m:A.f", wanted) == "changed"
    path.write_text("class A: pass\n")
    assert check_patches.status(upstream, "pkg.m:A.f", wanted) == "gone"
