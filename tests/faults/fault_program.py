"""The real program with faults put into it from outside: functions of the product, or of `os`, are wrapped by name.

Run as `python fault_program.py FAULTS ARGUMENTS...`, where FAULTS is a JSON list and ARGUMENTS are the program's own.
A fault is an object of

  at      "module:function" or "module:Class.method"
  call    at which call (1 is the first) of those that match
  when    "before" the call, "after" it, or "half": of a record's line half is written before
  path    only calls with an argument whose text matches this pattern (fnmatch) count
  rank    only this rank (default: 0; null: every rank)
  do      the signal, such as "SIGKILL"; a list sends several, 1.3 s apart
  to      "self" (this rank; default) or "parent" (the launcher)
  pause_s how long the stage then seems to take (default: 0)
  delay_s with "before": how far into the call it happens (default: 0)

and happens once. A fault that is sent to nobody because its call never comes is no fault: the file that the variable
FAULTS_DONE names gets one line for each that was sent.

The variable FAULTS_ENGINE, if set, is the address (JSON) of an engine that is there already: the program connects to it
where it would start engines of its own, which takes half a minute.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

DONE = "FAULTS_DONE"
ENGINE = "FAULTS_ENGINE"
PACKAGE = "megatron_fipo"
GAP_S = 1.3  # two signals closer than a second are one request
LANDS_WITHIN_S = 0.5  # a signal that goes round by the launcher


def inject(faults: Sequence[Mapping[str, Any]]) -> None:
    """Wrap what the faults of this rank name, wherever the product has imported it."""
    rank = int(os.environ.get("RANK", "0"))
    main = os.getpid()
    for index, fault in enumerate(faults):
        if fault.get("rank", 0) in (None, rank):
            counter = f"{os.environ[DONE]}.{rank}.{index}"
            _wrap(fault["at"], functools.partial(_faulty, fault=fault, main=main, counter=counter))


def connect(address: Mapping[str, Any]) -> Any:
    """The pool of the one engine at `address`."""
    engine: Any = importlib.import_module("megatron_fipo.rollout.engine")
    pool: Any = importlib.import_module("megatron_fipo.rollout.pool")
    client: Any = importlib.import_module("megatron_fipo.rollout.sglang_engine")
    client.SGLangEngine.process_id = 0  # its memory is not this run's
    return pool.EnginePool([client.connect_engine(engine.EngineAddress(**address))])


def _wrap(name: str, decorate: Callable[[Any], Any]) -> None:
    module_name, _, qualified = name.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, last = qualified.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = inspect.getattr_static(owner, last)
    is_static = isinstance(original, staticmethod)
    function = original.__func__ if is_static else original
    replacement = functools.wraps(function)(decorate(function))
    setattr(owner, last, staticmethod(replacement) if is_static else replacement)
    if inspect.ismodule(owner):
        for module in [module for key, module in sys.modules.items() if key.startswith(PACKAGE)]:
            if getattr(module, last, None) is original:
                setattr(module, last, replacement)


def _faulty(function: Callable[..., Any], *, fault: Mapping[str, Any], main: int, counter: str) -> Callable[..., Any]:
    os_open, os_write, os_close = os.open, os.write, os.close  # which may be what is wrapped

    def count() -> int:
        """The number of this call, among those of all processes that the rank has forked."""
        descriptor = os_open(counter, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os_write(descriptor, b".")
        number = os.lseek(descriptor, 0, os.SEEK_CUR)
        os_close(descriptor)
        return number

    def call(*arguments: Any, **options: Any) -> Any:
        pattern = fault.get("path")
        if pattern is not None and not any(fnmatch(str(value), pattern) for value in (*arguments, *options.values())):
            return function(*arguments, **options)
        if count() != fault.get("call", 1):
            return function(*arguments, **options)
        if fault["when"] == "after":
            result = function(*arguments, **options)
            _send(fault, main)
            return result
        if fault["when"] == "half":
            _write_half(*arguments)
        if "delay_s" in fault:
            threading.Timer(fault["delay_s"], _send, (fault, main)).start()
        else:
            _send(fault, main)
        return function(*arguments, **options)

    return call


def _write_half(file: Any, record: Mapping[str, Any]) -> None:
    """What a process leaves that is killed while it appends a record."""
    line = json.dumps(record)
    file.write(line[: len(line) // 2])
    file.flush()


def _send(fault: Mapping[str, Any], main: int) -> None:
    """Send the signals to the rank's own process, also from a process that it forked, which dies of SIGKILL too."""
    names = [fault["do"]] if isinstance(fault["do"], str) else fault["do"]
    done = os.open(os.environ[DONE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for index, name in enumerate(names):
        if index:
            time.sleep(GAP_S)
        os.write(done, f"{name} {fault['at']} {fault['when']}\n".encode())
        os.kill(os.getppid() if fault.get("to") == "parent" else main, signal.Signals[name])
        if name == "SIGKILL" and fault.get("to") != "parent" and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(done)
    time.sleep(fault.get("pause_s", LANDS_WITHIN_S if fault.get("to") == "parent" else 0.0))


def main() -> int:
    """The program, faults and all; without the picture that it ends with, which takes as long as all else."""
    faults, arguments = json.loads(sys.argv[1]), sys.argv[2:]
    for name in ("train", "run", "checks", "problems"):  # what the program imports only when it has checked its flags
        importlib.import_module(f"{PACKAGE}.{name}")
    inject(faults)
    if ENGINE in os.environ:
        address = json.loads(os.environ[ENGINE])
        _wrap(
            f"{PACKAGE}.rollout.server_process:start_engines", lambda function: lambda *_, **options: connect(address)
        )
    if not any("draw_curves" in fault["at"] for fault in faults):
        _wrap("megatron_fipo.metrics.curves:draw_curves", lambda function: lambda *arguments, **options: None)
    program: Any = importlib.import_module(f"{PACKAGE}.train")
    return program.main(arguments)


if __name__ == "__main__":
    assert Path(__file__).parent.name == "faults"
    sys.exit(main())
