"""Reads a dataclass's fields from its source file, without importing it: Megatron takes seconds to import and prints
warnings. Knows names, annotations, defaults and the docstrings under the fields."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.flags.option import ValueType


@dataclass(frozen=True)
class SourceField:
    """A field as written: `annotation` and `default` are syntax, `doc` is the docstring that follows the field."""

    name: str
    annotation: ast.expr
    default: ast.expr | None
    doc: str


@functools.cache
def read_fields(path: Path, class_name: str) -> tuple[SourceField, ...]:
    """The fields of class `class_name` in `path`, in order, without those of its bases. A file is parsed once.

    Raises ValueError when the file or the class is not there.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: is the installed package a version this project supports?")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return tuple(_fields_of(node))
    raise ValueError(f"{path} holds no class {class_name}")


def _fields_of(node: ast.ClassDef) -> Iterator[SourceField]:
    followers: list[ast.stmt | None] = [*node.body[1:], None]
    for statement, follower in zip(node.body, followers, strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        doc = ""
        if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
            doc = " ".join(inspect.cleandoc(str(follower.value.value)).split())
        yield SourceField(statement.target.id, statement.annotation, _default_of(statement.value), doc)


def _default_of(value: ast.expr | None) -> ast.expr | None:
    """The default itself: `field(default=x, ...)` is x, a factory has none."""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] == "field"):
        return value
    return next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)


def literal(node: ast.expr | None) -> object:
    """The value of a literal expression; None for anything else."""
    return node.value if isinstance(node, ast.Constant) else None


def value_type(annotation: ast.expr) -> ValueType | None:
    """What a flag for this annotation takes; None where no flag could give it (callables, tuples, dtypes).

    Of a union of a value and a list of such values, the list is taken: one or more.
    """
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return value_type(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.BinOp):
        return _union([annotation.left, annotation.right])
    if isinstance(annotation, ast.Subscript):
        inside = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        name = ast.unparse(annotation.value).split(".")[-1]
        if name in ("Optional", "Union"):
            return _union(inside)
        if name == "Literal":
            choices = tuple(literal(node) for node in inside if literal(node) is not None)
            return ValueType("int" if isinstance(choices[0], int) else "str", choices)
        if name in ("List", "list") and (element := value_type(inside[0])) is not None:
            return ValueType(element.kind, element.choices, many=True)
        return None
    kinds: dict[str, ValueType] = {
        "bool": ValueType("bool"),
        "int": ValueType("int"),
        "float": ValueType("float"),
        "str": ValueType("str"),
    }
    return kinds.get(ast.unparse(annotation))


def _union(members: list[ast.expr]) -> ValueType | None:
    found = [value_type(member) for member in members if ast.unparse(member) != "None"]
    several = [member for member in found if member is not None and member.many]
    return several[0] if several else found[0]
