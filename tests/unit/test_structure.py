"""The rules of the code's shape, kept by a test: floors of imports, sizes, names, docstrings, forbidden calls."""

from __future__ import annotations

import ast
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from forbidden_code import forbidden

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_fipo"
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80

DATA = frozenset(
    "types config data_config run_config megatron_config parallel user_function sheltered interruption".split()
)
MIDDLE = frozenset({"ops", "losses", "data", "rewards", "weights", "metrics"})
# A part of the package, and the other parts it may import. Other modules directly in megatron_fipo/ put a run together:
# they may import everything, and since no part may import them, nothing below does.
MAY_IMPORT: dict[str, frozenset[str]] = {
    **dict.fromkeys(DATA, DATA),
    **dict.fromkeys(MIDDLE, DATA | MIDDLE),
    "flags": DATA,
    "patches": DATA | MIDDLE,
    "actor": DATA | MIDDLE | {"patches"},
    "rollout": DATA | MIDDLE | {"patches"},
    "hybrid": DATA | MIDDLE | {"patches", "actor", "rollout"},
    "trainer": DATA | MIDDLE,
    "quantization": DATA | MIDDLE | {"trainer"},
    "arguments": DATA | MIDDLE | {"flags"},
    "planning": DATA | MIDDLE,
}
MAY_IMPORT_LIBRARY = {
    "megatron": {"actor", "patches"},
    "sglang": {"rollout", "patches"},
    "triton": {"ops", "patches"},
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
# Files that ask modules for names they compute: the user's own function, the rewards' warm-up, what patches stand in
# for, the dtypes in a checkpoint's metadata.
COMPUTE_NAMES = {
    "megatron_fipo/user_function.py",
    "megatron_fipo/rewards/registry.py",
    "megatron_fipo/actor/metadata_pickle.py",
    "patches/megatron_cpu/torch_on_cpu.py",
}
MACHINE_PATH = re.compile(
    r"(?<![\w.$}~])/(?:work|root|home/\w+|Users|opt/(?:pypi|wheels))\b|\.\./shared|(?<![\w.])/tmp/"
)
PATCH_HEADINGS = ("Why:", "Upstream:", "Drop-when:", "Test:")
NOT_PATCHES = {"__init__", "apply"}  # the modules of patches/ that hold no patch, beside stand-ins for other modules


@dataclass(frozen=True)
class Source:
    """A Python file: its dotted name as installed, and its syntax tree."""

    path: Path
    module: str

    @property
    def part(self) -> str:
        """The second name: the package or module of megatron_fipo this belongs to."""
        names = self.module.split(".")
        return names[1] if len(names) > 1 else ""

    @property
    def where(self) -> str:
        return str(self.path.relative_to(ROOT))


@cache
def tree_of(source: Source) -> ast.Module:
    return ast.parse(source.path.read_text(), filename=str(source.path))


@cache
def product() -> tuple[Source, ...]:
    """What is installed: megatron_fipo/, and patches/ as megatron_fipo.patches."""
    roots = ((ROOT / PACKAGE, PACKAGE), (ROOT / "patches", f"{PACKAGE}.patches"))
    return tuple(
        Source(path, ".".join([prefix, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__"))
        for root, prefix in roots
        for path in sorted(root.rglob("*.py"))
    )


@cache
def programs() -> tuple[Source, ...]:
    """Scripts that are run from the repository."""
    folders = (ROOT / name for name in ("examples", "tools", "benchmarks"))
    return tuple(Source(path, path.stem) for folder in folders for path in sorted(folder.rglob("*.py")))


def suite() -> list[Source]:
    return [Source(path, path.stem) for path in sorted((ROOT / "tests").rglob("*.py"))]


@cache
def imports(source: Source) -> tuple[tuple[str, int], ...]:
    """Dotted names that a file imports anywhere, functions and TYPE_CHECKING included; for `from a import b`: a.b."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.where}:{node.lineno}: relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return tuple(found)


def test_the_product_is_found() -> None:
    modules = {source.module for source in product()}
    assert {"megatron_fipo", "megatron_fipo.config", "megatron_fipo.metrics.run_logger"} <= modules
    assert "megatron_fipo.patches.megatron_cpu" in modules


def test_imports_only_go_down() -> None:
    found = []
    for source in product():
        if source.part not in MAY_IMPORT and source.module.count(".") <= 1 and source.path.parent.name == PACKAGE:
            continue
        assert source.part in MAY_IMPORT, f"{source.where}: which floor is {source.part!r} on? Add it to MAY_IMPORT"
        allowed = MAY_IMPORT[source.part] | {source.part}
        for name, line in imports(source):
            parts = name.split(".")
            if parts[0] == PACKAGE and len(parts) > 1 and parts[1] not in allowed:
                found.append(f"{source.where}:{line}: {source.part} imports {name}")
    assert not found, "\n".join(found)


def test_megatron_sglang_and_triton_stay_in_their_rooms() -> None:
    found = []
    for source in product():
        for name, line in imports(source):
            rooms = MAY_IMPORT_LIBRARY.get(name.split(".")[0])
            if rooms is not None and source.part not in rooms:
                found.append(f"{source.where}:{line}: imports {name}")
    assert not found, "\n".join(found)


def test_the_rooms_of_patches_do_not_mix() -> None:
    found = [
        f"{source.where}:{line}: imports {name}"
        for source in product()
        for name, line in imports(source)
        if (".patches.megatron" in source.module and name.startswith("sglang"))
        or (".patches.sglang" in source.module and name.startswith("megatron."))
        or (source.part == "rollout" and name.startswith(f"{PACKAGE}.patches.megatron"))
        or (source.part == "actor" and name.startswith(f"{PACKAGE}.patches.sglang"))
    ]
    assert not found, "\n".join(found)


def test_parallel_state_is_touched_in_one_file() -> None:
    found = {source.where for source in product() for name, _ in imports(source) if name.endswith(".parallel_state")}
    assert {path for path in found if not path.startswith("patches/")} <= {"megatron_fipo/actor/setup.py"}


def test_no_import_cycle() -> None:
    modules = {source.module for source in product()}
    graph: dict[str, set[str]] = {}
    for source in product():
        edges = graph.setdefault(source.module, set())
        for name, _ in imports(source):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != source.module:
                edges.add(target)
    assert find_cycle(graph) is None


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str] | None:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in finished:
            return None
        for target in sorted(graph[module]):
            cycle = visit(target, [*trail, module])
            if cycle:
                return cycle
        finished.add(module)
        return None

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), None)


def test_find_cycle_finds_one() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_files_and_functions_stay_small() -> None:
    found = []
    for source in [*product(), *programs(), *suite()]:
        lines = len(source.path.read_text().splitlines())
        if lines >= MAX_FILE_LINES:
            found.append(f"{source.where}: {lines} lines")
        for node in ast.walk(tree_of(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length >= MAX_FUNCTION_LINES:
                    found.append(f"{source.where}:{node.lineno}: {node.name} has {length} lines")
    assert not found, "\n".join(found)


def test_no_module_is_a_grab_bag() -> None:
    sources = [*product(), *programs(), *suite()]
    found = [source.where for source in sources if FORBIDDEN_NAMES & {source.path.stem, source.path.parent.name}]
    assert not found, "\n".join(found)


def test_public_names_have_docstrings() -> None:
    found = []
    for source in product():
        tree = tree_of(source)
        if not ast.get_docstring(tree):
            found.append(f"{source.where}: module")
        for node in tree.body:
            is_definition = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            if is_definition and not node.name.startswith("_") and not ast.get_docstring(node):
                found.append(f"{source.where}:{node.lineno}: {node.name}")
    assert not found, "\n".join(found)


def test_no_text_and_no_data_is_run_as_code() -> None:
    found = [
        f"{source.where}:{line}: {what}"
        for source in [*product(), *programs()]
        for line, what in forbidden(tree_of(source), computes_names=source.where in COMPUTE_NAMES)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "eval(x)",
        "exec(x)",
        "run = eval",
        "map(eval, texts)",
        "compile(x, '', 'exec')",
        "__import__(name)",
        "import builtins\nbuiltins.exec(x)",
        "from builtins import eval as run",
        "import builtins\ngetattr(builtins, 'ev' + 'al')(x)",
        "import builtins as b\nvars(b)['eval'](x)",
        "__builtins__['eval'](x)",
        "frame.eval('a + b')",
        "().__class__.__base__.__subclasses__()",
        "f.__globals__",
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(x)",
        "from pickle import load",
        "from pickle import *",
        "import pickle\nq = pickle\nq.load(f)",
        "import pickle\nload = getattr(pickle, 'load')",
        "import pickle\ngetattr(pickle, name)(f)",
        "import pickle\npickle.__dict__[name](f)",
        "import pickle\nclass U(pickle.Unpickler): pass",
        "import pickle, functools\nfunctools.partial(pickle.loads, x)",
        "import importlib\nimportlib.import_module('pickle').loads(x)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module as get\nget('dill').load(f)",
        "import sys\nsys.modules['pickle'].load(f)",
        "def f(read=eval): read(x)",
        "import pickle\na, b = 1, pickle\nb.load(f)",
        "(p := __import__('pickle')).load(f)",
        "import _pickle",
        "import dill",
        "from cloudpickle import loads",
        "from joblib import load",
        "import marshal",
        "import shelve",
        "import runpy",
        "import pandas as pd\npd.read_pickle(f)",
        "from multiprocessing.reduction import ForkingPickler\nForkingPickler.loads(x)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "import torch\ntorch.load(f, weights_only=1)",
        "import torch as t\nt.load(f)",
        "from torch import load\nload(f)",
        "from torch.serialization import load",
        "import torch\nread = torch.load",
        "import torch\ngetattr(torch, 'load')(f)",
        "import torch\ngetattr(torch, name)(f)",
        "import torch\nread(f, **{'weights_only': False})",
        "import torch\ntorch.load(f, weights_only=True, pickle_module=p)",
        "import torch\ntorch.jit.load(f)",
        "import torch.hub\ntorch.hub.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, allow_pickle=flag)",
        "import numpy as np\nnp.load(f, None, True)",
        "from numpy.lib.format import read_array",
        "import subprocess\nsubprocess.run(c, shell=True)",
        "import subprocess\nsubprocess.run(c, shell=flag)",
        "import subprocess\nsubprocess.run(c, **dict(shell=1))",
        "import subprocess\nsubprocess.run(c, **{'shell': True})",
        "import subprocess\nsubprocess.Popen(c, -1, None, None, None, None, None, True, True)",
        "import subprocess\nsubprocess.run(['/bin/bash', '-c', text])",
        "from subprocess import getoutput",
        "import asyncio\nasyncio.create_subprocess_shell(c)",
        "import os\nos.system(c)",
        "from os import popen as run",
        "import os\nos.execvp(a, b)",
        "import os as o\no.spawnlp(a, b)",
        "import os\nos.posix_spawn(a, b, c)",
        "import pty",
        "import yaml\nyaml.load(f)",
        "from yaml import unsafe_load",
        "import yaml\nyaml.safe_load(f, Loader=yaml.UnsafeLoader)",
        "from importlib.util import spec_from_file_location",
        "spec.loader.exec_module(module)",
        "AutoModel.from_pretrained(d, trust_remote_code=True)",
        "AutoModel.from_pretrained(d, trust_remote_code=flag)",
        "import operator, pickle\noperator.attrgetter(name)(pickle)(f)",
    ],
)
def test_running_data_as_code_is_recognised(code: str) -> None:
    assert forbidden(ast.parse(code)), code


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "import re\nre.compile(x)",
        "import torch\ntorch.compile(f)\ntorch.load(f, weights_only=True)",
        "import pickle\npickle.dumps(x)",
        "import json\njson.load(f)",
        "import subprocess\nsubprocess.run([a, b], check=True, shell=False)",
        "import numpy as np\nnp.load(f)\nnp.load(f, allow_pickle=False)",
        "import yaml\nyaml.safe_load(f)",
        "getattr(self, name)",
        "import ast\nast.literal_eval(x)",
        "import importlib\nimportlib.import_module('wandb')",
    ],
)
def test_what_only_looks_like_it_is_not(code: str) -> None:
    assert not forbidden(ast.parse(code))


def test_no_error_is_swallowed() -> None:
    found = []
    for source in [*product(), *programs()]:
        for node in ast.walk(tree_of(source)):
            if isinstance(node, ast.ExceptHandler) and all(isinstance(child, ast.Pass) for child in node.body):
                names = set() if node.type is None else set(re.findall(r"\w+", ast.unparse(node.type)))
                if node.type is None or names & {"Exception", "BaseException"}:
                    found.append(f"{source.where}:{node.lineno}")
    assert not found, "\n".join(found)


def test_no_path_of_a_machine() -> None:
    suffixes = {".py", ".sh", ".md", ".txt", ".toml", ".yml", ".yaml", ".json", ".cfg", ""}
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split(
        "\n"
    )
    found = []
    for name in filter(None, listed):
        path = ROOT / name
        if path.suffix not in suffixes or path == Path(__file__) or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{name}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_every_patch_says_why_and_until_when() -> None:
    found = []
    for source in product():
        if source.part != "patches" or source.path.stem in NOT_PATCHES or "models" in source.module.split("."):
            continue
        docstring = ast.get_docstring(tree_of(source)) or ""
        missing = [heading for heading in PATCH_HEADINGS if not re.search(rf"^{heading} *\S", docstring, re.MULTILINE)]
        found += [f"{source.where}: no {heading}" for heading in missing]
        for path, function in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", docstring):
            test = ROOT / path
            if not test.is_file() or (function and f"def {function}(" not in test.read_text()):
                found.append(f"{source.where}: names a test that is not there: {path}{function and '::' + function}")
    assert not found, "\n".join(found)
