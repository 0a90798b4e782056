"""The Dockerfile as data: its stages' instructions, and the pins that its pip lines name themselves."""

from __future__ import annotations

import re
from pathlib import Path

INSTRUCTION = re.compile(r"^([A-Z]+)\s+(.*)$", re.DOTALL)
KNOWN = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "CMD"}


def stages_of(repo_root: Path) -> dict[str, list[tuple[str, str]]]:
    """By name, in order: the instructions of each stage, its FROM first."""
    text = re.sub(r"^\s*#.*\n", "", (repo_root / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not line.strip():
            continue
        match = INSTRUCTION.match(line)
        assert match, line
        assert match[1] in KNOWN, line
        if match[1] == "FROM":
            name = re.fullmatch(r"\S+ AS (\w+)", match[2])[1]
        found.setdefault(name, []).append((match[1], match[2]))
    return found


def values(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [value for name, value in stage if name == instruction]


def arguments(stage: list[tuple[str, str]]) -> dict[str, str]:
    return dict(value.split("=", 1) for value in values(stage, "ARG"))


def named_pins(stage: list[tuple[str, str]]) -> set[str]:
    """`name==version` as the pip lines of a stage say themselves, of all that is installed with its dependencies."""
    parts = [part for command in values(stage, "RUN") for part in command.split("&&") if "--no-deps" not in part]
    words = {word.strip('"') for part in parts for word in part.split() if "==" in word}
    given = arguments(stage)
    return {re.sub(r"\$(\w+)", lambda match: given[match[1]], word) for word in words}
