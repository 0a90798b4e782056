"""Verdicts by libraries that catch every exception: what would have been taken for a wrong answer is raised."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any


class _Unsilenced(BaseException):
    """Carries an exception past `except Exception`."""


@contextlib.contextmanager
def unsilenced(modules: Collection[str]) -> Iterator[None]:
    """Raise the MemoryError or RecursionError that the functions of these modules would catch, and let numbers be read
    and written with any number of digits.

    A trace function watches the modules' frames. When it cannot run itself for lack of either, Python removes it, which
    is seen at the end.
    """

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if frame.f_globals.get("__name__") in modules:
            frame.f_trace_lines = False
            return trace_exceptions
        return None

    def trace_exceptions(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "exception" and issubclass(argument[0], MemoryError | RecursionError):
            raise _Unsilenced(argument[0])
        return trace_exceptions

    trace_before, max_digits_before = sys.gettrace(), sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    sys.settrace(trace)
    try:
        yield
        lost: type[BaseException] | None = None if sys.gettrace() is trace else RecursionError
    except _Unsilenced as error:
        lost = error.args[0]
    finally:
        sys.settrace(trace_before)
        sys.set_int_max_str_digits(max_digits_before)
    if lost is not None:
        raise lost("in the verifier, which would have called the answer wrong")
