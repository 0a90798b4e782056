"""Writes megatron_fipo/flags/sglang_names.py from the installed SGLang's source; --check only compares.

    python tools/write_flag_tables.py [--check]

SGLang declares its options as annotated fields in sglang/srt/arg_groups/fields/*.py. They are read as syntax: importing
SGLang takes seconds and probes the machine.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "megatron_fipo" / "flags" / "sglang_names.py"


def main() -> int:
    """Write or compare the table; the exit status is 1 when --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where they differ")
    options = parser.parse_args()
    text = render(sglang_source())
    if options.check:
        if TARGET.read_text(encoding="utf-8") == text:
            return 0
        print(f"{TARGET} differs from the installed SGLang: run python tools/write_flag_tables.py", file=sys.stderr)
        return 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


def sglang_source() -> Path:
    """sglang/srt of the installed package, found without importing it."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("error: sglang is not installed")
    return Path(spec.submodule_search_locations[0]) / "srt"


def render(source: Path) -> str:
    """The table as a Python module."""
    kinds: dict[str, list[str]] = {}
    choices: dict[str, list[object]] = {}
    aliases: dict[str, list[str]] = {}
    for name, kind, allowed, other_names in _options(source):
        kinds.setdefault(kind, []).append(name)
        if allowed:
            choices[name] = allowed
        if other_names:
            aliases[name] = other_names
    lines = [
        '"""The options of SGLang\'s server by the kind of value they take: written by tools/write_flag_tables.py."""',
        "",
        "from __future__ import annotations",
        "",
        f'SGLANG_VERSION = "{importlib.metadata.version("sglang")}"',
        "",
        "FIELDS_BY_KIND: dict[str, str] = {",
        *(line for kind in sorted(kinds) for line in _row(kind, sorted(kinds[kind]))),
        "}",
        "",
        "CHOICES: dict[str, str] = {",
        *(line for name in sorted(choices) for line in _row(name, [str(value) for value in choices[name]])),
        "}",
        "",
        "OTHER_NAMES: dict[str, str] = {",
        *(line for name in sorted(aliases) for line in _row(name, aliases[name])),
        "}",
        "",
    ]
    return "\n".join(lines)


def _row(key: str, words: list[str]) -> list[str]:
    """A line of a dict from a name to words, broken over several lines where it is too long for one."""
    line = f'    "{key}": "{" ".join(words)}",'
    if len(line) <= 120:
        return [line]
    parts = textwrap.wrap(" ".join(words), width=108, break_long_words=False, break_on_hyphens=False)
    quoted = [f'        "{part} "' for part in parts[:-1]] + [f'        "{parts[-1]}"']
    return [f'    "{key}": (', *quoted, "    ),"]


def _options(source: Path) -> Iterator[tuple[str, str, list[object], list[str]]]:
    """Name, kind, choices and further option names of every field that SGLang's own command line offers."""
    by_hand = _added_by_hand(source / "server_args.py")
    for path in sorted((source / "arg_groups" / "fields").glob("*.py")):
        for cls in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(cls, ast.ClassDef):
                continue
            for node in cls.body:
                if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                    continue
                name, annotation, arg = node.target.id, node.annotation, {}
                offered = False
                if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A":
                    assert isinstance(annotation.slice, ast.Tuple)
                    annotation, extra = annotation.slice.elts[0], annotation.slice.elts[1]
                    offered = True
                    if isinstance(extra, ast.Call):
                        arg = {keyword.arg: keyword.value for keyword in extra.keywords if keyword.arg}
                        offered = "no_cli" not in arg
                flag = "--" + name.replace("_", "-")
                kind = _kind(annotation, arg)
                if kind is None or not (offered or flag in by_hand):
                    continue
                names = [ast.literal_eval(arg["cli_name"])] if "cli_name" in arg else []
                names += ast.literal_eval(arg["aliases"]) if "aliases" in arg else []
                yield name, kind, _choices(annotation, arg), [other for other in names if other != flag]


def _kind(annotation: ast.expr, arg: dict[str, ast.expr]) -> str | None:
    """The kind of value, or None for what only a program could give (a callable, a parsed structure)."""
    parser = ast.unparse(arg["type_parser"]) if "type_parser" in arg else ""
    if parser == "human_readable_int":
        return "size"
    if parser in ("json.loads", "json_list_type"):
        return "json"
    text = ast.unparse(annotation)
    if text.startswith("Optional["):
        text = text[len("Optional[") : -1]
    simple = {
        "bool": "bool",
        "int": "int",
        "float": "float",
        "str": "str",
        "List[int]": "ints",
        "List[float]": "floats",
        "List[str]": "strs",
    }
    if text.startswith("Literal["):
        values = [node.value for node in ast.walk(annotation) if isinstance(node, ast.Constant)]
        return "int" if all(isinstance(value, int) for value in values) else "str"
    return simple.get(text)


def _choices(annotation: ast.expr, arg: dict[str, ast.expr]) -> list[object]:
    """The values allowed where the field itself lists them; lists with a name of their own can grow by plugins."""
    listed = arg.get("choices")
    if isinstance(listed, ast.List | ast.Tuple):
        return [item.value for item in listed.elts if isinstance(item, ast.Constant)]
    if listed is not None or "Literal[" not in ast.unparse(annotation):
        return []
    return [node.value for node in ast.walk(annotation) if isinstance(node, ast.Constant) and node.value is not None]


def _added_by_hand(path: Path) -> set[str]:
    """The flags that a module gives to `parser.add_argument` one by one."""
    return {
        argument.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument")
        for argument in node.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }


if __name__ == "__main__":
    sys.exit(main())
