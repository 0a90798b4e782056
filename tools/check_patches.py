#!/usr/bin/env python3
"""Compare what patches/ replaces with the upstream that is installed, or with another release of it from PyPI.

    python tools/check_patches.py                            # megatron-core and SGLang as installed here
    python tools/check_patches.py --megatron-core 0.19.2     # that release's wheel, downloaded with pip

One line a symbol: same, changed or gone. Exit status 1 unless every symbol is the same. Nothing of upstream is
imported: sources are parsed. A symbol's hash is that of its code without comments, docstrings and layout.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import tokenize
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PATCHES = Path(__file__).resolve().parent.parent / "patches"
UPSTREAMS = {"megatron_cpu": "megatron-core", "sglang_cpu": "sglang"}
PACKAGES = {"megatron-core": "megatron", "sglang": "sglang"}
HEADINGS = ("Why", "Upstream", "Drop-when", "Test")
NOT_PATCHES = ("__init__", "apply")
CUDA_NAMES = re.compile(r"\btorch\.cuda(?:\.\w+)+|device=[\"']cuda[\"']|\.cuda\(\)|torch\.cuda\.\w*Tensor")


@dataclass(frozen=True)
class Patch:
    """A module of patches/: its docstring's sections, what it replaces and the hashes of that."""

    path: Path
    sections: Mapping[str, str]
    replaces: Mapping[str, str]

    @property
    def upstream(self) -> str:
        """The distribution it patches."""
        return UPSTREAMS[self.path.relative_to(PATCHES).parts[0]]


def read_patches() -> list[Patch]:
    """All of them, by path. Raises ValueError for one without its sections or without REPLACES."""
    found = []
    for directory in UPSTREAMS:
        for path in sorted((PATCHES / directory).glob("*.py")):
            if path.stem in NOT_PATCHES:
                continue
            tree = ast.parse(path.read_text())
            declared = [
                node.value
                for node in tree.body
                if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "REPLACES" and node.value is not None
            ]
            if len(declared) != 1:
                raise ValueError(f"{path} does not declare what it replaces: REPLACES")
            found.append(Patch(path, sections(ast.get_docstring(tree) or ""), ast.literal_eval(declared[0])))
    return found


def sections(docstring: str) -> dict[str, str]:
    """`Why: ...` and its like, each on one line. Raises ValueError when one is missing."""
    parts = {}
    for heading in HEADINGS:
        match = re.search(rf"^{heading}: *(.*?)(?=^(?:{'|'.join(HEADINGS)}):|\n\n|\Z)", docstring, re.M | re.S)
        if match is None:
            raise ValueError(f"a patch's docstring has no {heading}: {docstring[:60]!r}")
        parts[heading] = " ".join(match[1].split())
    return parts


def status(root: Path, symbol: str, wanted: str) -> str:
    """Of `module:name` below `root`, the directory that holds the package: same, changed or gone."""
    source = symbol_source(root, symbol)
    if source is None:
        return "gone"
    return "same" if symbol_hash(source) == wanted else "changed"


def symbol_hash(source: str) -> str:
    """The first 16 digits of its SHA-256."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def symbol_source(root: Path, symbol: str) -> str | None:
    """The code that makes `module:Class.name`, without comments and docstrings; None when there is none.

    Of a name that is assigned or imported, all statements that do so. `package:torch.cuda` stands for every name below
    torch.cuda that a file of the package uses.
    """
    module, _, dotted = symbol.partition(":")
    path = root.joinpath(*module.split("."))
    if dotted == "torch.cuda":
        return "\n".join(_cuda_names(path)) or None
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        return None
    nodes: list[ast.stmt] = ast.parse(path.read_text()).body
    for name in dotted.split("."):
        nodes = [found for node in nodes for found in _makers(node, name)]
        if not nodes:
            return None
        last = nodes
        nodes = [child for node in nodes if isinstance(node, ast.ClassDef) for child in node.body]
    return "\n".join(ast.unparse(_without_docstrings(node)) for node in last)


def _cuda_names(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        names = CUDA_NAMES.findall(text) if "cuda" in text else []
        if names:
            yield f"{path.relative_to(package)}: {' '.join(sorted(set(names)))}"


def _makers(node: ast.stmt, name: str) -> Iterator[ast.stmt]:
    """The statements in `node`, itself included, that bind `name` at this level: through if, try and with."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        if node.name == name:
            yield node
    elif isinstance(node, ast.Import | ast.ImportFrom):
        if any((alias.asname or alias.name.partition(".")[0]) == name for alias in node.names):
            yield node
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(each, ast.Name) and each.id == name for target in targets for each in ast.walk(target)):
            yield node
    else:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                yield from _makers(child, name)
            elif isinstance(child, ast.ExceptHandler):
                for inner in child.body:
                    yield from _makers(inner, name)


def _without_docstrings(node: ast.stmt) -> ast.stmt:
    for each in ast.walk(node):
        if (
            isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and ast.get_docstring(each) is not None
        ):
            each.body = each.body[1:] or [ast.Pass()]
    return node


def code_lines(path: Path) -> int:
    """Lines of a file that are neither blank nor comment nor docstring."""
    lines: set[int] = set()
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in layout and token.type != tokenize.ENCODING:
                lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def readme_table(patches: list[Patch]) -> str:
    """The table of patches/README.md."""
    rows = ["| file | why | upstream | drop when | test |", "| --- | --- | --- | --- | --- |"]
    for patch in patches:
        cells = [f"`{patch.path.relative_to(PATCHES)}`", *(patch.sections[heading] for heading in HEADINGS)]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def installed_root(distribution: str) -> Path:
    """The directory that holds the installed package. Raises ValueError when there is none."""
    package = PACKAGES[distribution]
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        return Path(location).parent
    raise ValueError(f"{distribution} is not installed here")


def download(distribution: str, release: str, python: str, directory: Path) -> Path:
    """A release's wheel from the package index, unpacked below `directory`. Raises ValueError with pip's last words."""
    wanted = [f"{distribution}=={release}", "--no-deps", "--only-binary=:all:", "--python-version", python]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *wanted]
    done = subprocess.run([*command, "--dest", str(directory)], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        words = " ".join((done.stderr or "no wheel came").split())
        raise ValueError(f"{wanted[0]} could not be downloaded: {words[-300:]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(directory / "unpacked")
    return directory / "unpacked"


def main() -> int:
    """Print the table; 0 when every symbol is the same, 1 when one is not, 2 when it could not be looked at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron-core", metavar="RELEASE", help="of PyPI (default: the installed one)")
    parser.add_argument("--sglang", metavar="RELEASE", help="of PyPI (default: the installed one)")
    parser.add_argument("--python-version", default="3.12", help="of the wheels that are downloaded (default: 3.12)")
    arguments = parser.parse_args()
    releases = {"megatron-core": arguments.megatron_core, "sglang": arguments.sglang}
    asked = [name for name, release in releases.items() if release is not None] or list(releases)
    worst = 0
    try:
        patches = read_patches()
        with tempfile.TemporaryDirectory() as directory:
            for distribution in asked:
                aside, release = Path(directory, distribution), releases[distribution]
                aside.mkdir()
                if release is None:
                    root = installed_root(distribution)
                else:
                    root = download(distribution, release, arguments.python_version, aside)
                for patch in patches:
                    for symbol, wanted in patch.replaces.items() if patch.upstream == distribution else ():
                        found = status(root, symbol, wanted)
                        worst = max(worst, int(found != "same"))
                        print(f"{found:8} {patch.path.relative_to(PATCHES)}  {symbol}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return worst


if __name__ == "__main__":
    sys.exit(main())
