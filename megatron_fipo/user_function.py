"""The user's own functions, given on the command line as module:function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def load_user_function(flag: str, path: str) -> Callable[..., Any]:
    """The function `module:function`, whose module is imported.

    Raises ValueError naming `flag` and `path` when there is none; whatever the module raises while it is imported
    passes through.
    """
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name or module_name.startswith("."):
        raise ValueError(f"{flag} is {path!r}, but must be module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ValueError(f"{flag} is {path!r}, but the module {module_name!r} is not importable") from error
        raise
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{flag} is {path!r}, but the module {module_name!r} has no function {function_name!r}")
    return function
