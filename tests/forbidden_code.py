"""Finds Python code that runs text or data as code, under whatever name: the rules that test_structure.py holds to.

A reference is enough, called or not: what may not be named cannot be passed on, renamed or wrapped either.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

RUNS_TEXT = {"eval", "exec", "compile", "__import__", "__builtins__"}
MODULES = set(  # nothing in them is wanted
    "_pickle cPickle dill cloudpickle joblib marshal shelve runpy pty imp code codeop commands zipimport jsonpickle "
    "numexpr execnet fabric".split()
)
NAMES = {
    *(f"builtins.{name}" for name in RUNS_TEXT),
    *(f"pickle.{name}" for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler")),
    *("multiprocessing.reduction.ForkingPickler.loads", "torch.multiprocessing.reductions.ForkingPickler.loads"),
    *("numpy.core.multiarray._reconstruct", "numpy.lib.format.read_array"),
    *(
        "pandas.read_pickle",
        "pandas.eval",
        "sympy.sympify",
        "sympy.parse_expr",
        "sympy.parsing.sympy_parser.parse_expr",
    ),
    *("torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.package.PackageImporter"),
    *("torch.serialization.load", "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"),
    *(f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all")),
    *(f"yaml.{name}" for name in ("Loader", "CLoader", "UnsafeLoader", "FullLoader")),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("os.system", "os.popen", "os.startfile", "posix.system", "platform.popen"),
    *("importlib.util.spec_from_file_location", "importlib.machinery.SourceFileLoader", "importlib.reload"),
    *("importlib.machinery.SourcelessFileLoader", "importlib.machinery.ExtensionFileLoader"),
    "ctypes.pythonapi",
}
PREFIXES = ("os.exec", "os.spawn", "os.posix_spawn", "posix.exec", "posix.spawn")
ATTRIBUTES = {"__subclasses__", "__globals__", "__builtins__", "__code__", "exec_module", "load_module", "read_pickle"}
GUARDED_MODULES = {  # nobody asks these for an attribute by a name that is not written out
    *("builtins", "pickle", "os", "posix", "subprocess", "yaml", "torch", "numpy", "pandas", "importlib", "asyncio"),
    *("multiprocessing.reduction", "importlib.util", "importlib.machinery", "torch.serialization", "sys"),
}
ONLY = {"weights_only": True, "shell": False, "allow_pickle": False, "trust_remote_code": False, "pickle_module": None}
SHELLS = {"sh", "bash", "zsh", "dash", "csh", "ksh", "fish", "cmd", "cmd.exe", "powershell"}


def forbidden(tree: ast.Module, *, computes_names: bool = False) -> list[tuple[int, str]]:
    """(line, what) of what is forbidden in a file. With `computes_names` it may ask modules for names it computes."""
    aliases = _aliases(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [(line, f"import of {name}") for name in _imported(node) if _is_forbidden(name)]
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                found.append((line, f"from {node.module} import *"))
        elif isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript):
            name = _resolved(node, aliases)
            if name is not None and _is_forbidden(name):
                found.append((line, name))
            if name == "torch.load" and id(node) not in called:
                found.append((line, "torch.load passed on"))
            if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
                found.append((line, f".{node.attr}"))
            if isinstance(node, ast.Attribute) and node.attr == "__dict__" and _guarded(node.value, aliases):
                found.append((line, f"{ast.unparse(node)}"))
        if isinstance(node, ast.Call):
            found += [(line, what) for what in _of_call(node, aliases, computes_names=computes_names)]
        if isinstance(node, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            found += [(line, f"{key!r} in a dict") for key, value in zip(keys, node.values) if _breaks(key, value)]
        if isinstance(node, ast.List | ast.Tuple):
            found += [(line, "a shell's -c")] if _is_shell(node) else []
    return sorted(set(found))


def _of_call(call: ast.Call, aliases: dict[str, str], *, computes_names: bool) -> Iterator[str]:
    name = _resolved(call.func, aliases) or ""
    for keyword in call.keywords:
        if _breaks(keyword.arg, keyword.value):
            yield f"{keyword.arg}={ast.unparse(keyword.value)}"
    if name == "torch.load" and not any(keyword.arg == "weights_only" for keyword in call.keywords):
        yield "torch.load without weights_only=True"
    if name == "numpy.load" and len(call.args) > 2:
        yield "numpy.load with allow_pickle by position"
    if name.startswith("subprocess.") and len(call.args) > 1:
        yield f"{name} with options by position"
    if name == "importlib.import_module" and not computes_names and not _is_text(call.args[:1]):
        yield "import of a computed name"
    is_getter = name in ("builtins.getattr", "builtins.vars", "builtins.setattr", "inspect.getattr_static")
    by_name = len(call.args) > 1 and _is_text(call.args[1:2])
    if is_getter and call.args and _guarded(call.args[0], aliases) and not by_name and not computes_names:
        yield f"{ast.unparse(call)[:60]}"
    if isinstance(call.func, ast.Attribute):
        if call.func.attr in ("eval", "exec") and (call.args or call.keywords):
            yield f".{call.func.attr} of something"
        if call.func.attr in ("__getattribute__", "__getattr__") and not computes_names:
            yield f".{call.func.attr}"
    if name in ("operator.attrgetter", "operator.methodcaller") and not _is_text(call.args[:1]):
        yield f"{name} of a computed name"


def _aliases(tree: ast.Module) -> dict[str, str]:
    """What each name of the file stands for, dotted: imports, and names given to what they stand for."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    while True:
        before = len(aliases)
        for node in ast.walk(tree):
            for target, value in _bindings(node):
                name = _resolved(value, aliases)
                if name is not None and target not in aliases:
                    aliases[target] = name
        if len(aliases) == before:
            return aliases


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """(name, expression) of what an assignment binds."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _unpacked(target, node.value)
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        yield from _unpacked(node.target, node.value)
    elif isinstance(node, ast.arguments):
        given = [*node.posonlyargs, *node.args]
        pairs = [*zip(given[len(given) - len(node.defaults) :], node.defaults), *zip(node.kwonlyargs, node.kw_defaults)]
        yield from ((argument.arg, default) for argument, default in pairs if default is not None)


def _unpacked(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List):
        for inner, each in zip(target.elts, value.elts):
            yield from _unpacked(inner, each)


def _resolved(node: ast.expr, aliases: dict[str, str]) -> str | None:
    """The dotted name that an expression stands for, as far as it can be read off; None for anything else."""
    if isinstance(node, ast.Name):
        own = {"getattr", "vars", "setattr", *RUNS_TEXT}
        return aliases.get(node.id) or (f"builtins.{node.id}" if node.id in own else None)
    if isinstance(node, ast.Attribute):
        head = _resolved(node.value, aliases)
        return None if head is None else f"{head}.{node.attr}"
    if isinstance(node, ast.NamedExpr):
        return _resolved(node.value, aliases)
    if isinstance(node, ast.Subscript):
        is_module = _resolved(node.value, aliases) == "sys.modules" and _is_text([node.slice])
        return str(ast.literal_eval(node.slice)) if is_module else None
    if isinstance(node, ast.Call):
        name = _resolved(node.func, aliases)
        if name == "importlib.import_module" and _is_text(node.args[:1]):
            return str(ast.literal_eval(node.args[0]))
        if name == "builtins.getattr" and _is_text(node.args[1:2]):
            head = _resolved(node.args[0], aliases)
            return None if head is None else f"{head}.{ast.literal_eval(node.args[1])}"
    return None


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def _is_forbidden(name: str) -> bool:
    return name in NAMES or name.split(".", maxsplit=1)[0] in MODULES or name.startswith(PREFIXES)


def _guarded(node: ast.expr, aliases: dict[str, str]) -> bool:
    return _resolved(node, aliases) in GUARDED_MODULES


def _breaks(key: str | None, value: ast.expr) -> bool:
    return key in ONLY and not (isinstance(value, ast.Constant) and value.value is ONLY[key])


def _is_text(nodes: list[ast.expr]) -> bool:
    return len(nodes) == 1 and isinstance(nodes[0], ast.Constant) and isinstance(nodes[0].value, str)


def _is_shell(node: ast.List | ast.Tuple) -> bool:
    words = [item.value for item in node.elts if isinstance(item, ast.Constant) and isinstance(item.value, str)]
    return bool(words) and words[0].rsplit("/", 1)[-1] in SHELLS and any(word in ("-c", "-lc", "/c") for word in words)
