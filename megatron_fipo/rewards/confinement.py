"""What a grader process of a built-in reward may not do. Several of reasoning-gym's verifiers hand the answer to `eval`
or to sympy's parser, which evaluates it: an answer is then a program, and this is what keeps it harmless."""

from __future__ import annotations

import os
import sys
from types import CodeType
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "tempfile.", "ctypes.", "resource.", "fcntl.", "pty.", "signal.")
ALLOWED = frozenset({"os.listdir", "os.scandir"})  # imports look for files
EVALUATING_MODULES = ("reasoning_gym.", "sympy.parsing.")


def confine() -> None:
    """From here on and for ever, this process writes no file, starts and signals no process, opens no connection, and
    evaluates no text that names `__import__` or another dunder: all of it raises PermissionError.

    An audit hook (PEP 578): a wall against answers, not against native code.
    """
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        flags = arguments[2]
        if not isinstance(flags, int) or flags & WRITING:
            raise PermissionError(f"a grader process opens no file for writing: {arguments[0]!r}")
    elif event == "exec":
        caller = sys._getframe(1).f_globals.get("__name__", "")
        code = arguments[0]
        # codeio executes its own problems, while it builds them; an answer is what eval and sympy are given
        if caller.startswith(EVALUATING_MODULES) and not caller.startswith("reasoning_gym.code.") and _has_dunder(code):
            raise PermissionError("an answer is evaluated only if it names no dunder")
    elif event.startswith(REFUSED) and event not in ALLOWED:
        raise PermissionError(f"a grader process does no {event}")


def _has_dunder(code: CodeType) -> bool:
    return any(name.startswith("__") for name in (*code.co_names, *code.co_varnames)) or any(
        _has_dunder(constant) for constant in code.co_consts if isinstance(constant, CodeType)
    )
