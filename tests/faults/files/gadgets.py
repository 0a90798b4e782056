"""Pickles that call what they name when they are loaded: every way a pickle has, each leaving a canary behind."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


class Calls:
    """Pickled, it calls `function(*arguments)` on loading."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def gadgets(canary: Path) -> Iterator[tuple[str, bytes]]:
    """(name, pickle): loaded freely, each makes the directory `canary`."""
    path, ascii_path = str(canary), str(canary).encode()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield f"REDUCE, protocol {protocol}", pickle.dumps(Calls(os.mkdir, path), protocol)
    short = bytes([len(ascii_path)]) + ascii_path
    assert len(ascii_path) < 256, path
    yield "GLOBAL", b"cos\nmkdir\n(S'" + ascii_path + b"'\ntR."
    yield "INST", b"(S'" + ascii_path + b"'\nios\nmkdir\n."
    yield "OBJ", b"(cos\nmkdir\nS'" + ascii_path + b"'\no."
    yield "STACK_GLOBAL", b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c" + short + b"\x85R."
    yield "STACK_GLOBAL, dotted", b"\x80\x04\x8c\x05torch\x8c\x08os.mkdir\x93\x8c" + short + b"\x85R."
    yield "EXT1", b"\x80\x02\x82\xf0(X" + len(ascii_path).to_bytes(4, "little") + ascii_path + b"tR."
    yield "PERSID", b"P" + ascii_path + b"\n."
    yield (
        "BUILD with a foreign __setstate__",
        (
            b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}S'__setstate__'\ncos\nmkdir\nsbS'"
            + ascii_path
            + b"'\nb."
        ),
    )
    yield "os.system", pickle.dumps(Calls(os.system, f"mkdir '{path}'"))
    yield "subprocess.Popen", pickle.dumps(Calls(subprocess.Popen, ["mkdir", path]))
    yield "eval", pickle.dumps(Calls(builtins.eval, f"__import__('os').mkdir({path!r})"))
    yield "exec", pickle.dumps(Calls(builtins.exec, f"import os; os.mkdir({path!r})"))
    inner = pickle.dumps(Calls(os.mkdir, path))
    yield "pickle.loads, nested", pickle.dumps(Calls(pickle.loads, inner))
    yield "in a list in a dict", pickle.dumps({"state": [1, {"deep": (Calls(os.mkdir, path),)}]})
    yield "getattr", pickle.dumps(Calls(builtins.getattr, Calls(builtins.__import__, "os"), "mkdir"))
    yield "torch.load", pickle.dumps(Calls(torch.load, Calls(io.BytesIO, saved(inner)), None, None))


def broken_pickles() -> Iterator[tuple[str, bytes]]:
    """(name, bytes) that are no good pickles: each leads the loader into another kind of error."""
    yield "nothing", b""
    yield "no pickle", b"\x00not a pickle"
    yield "a stack that is empty", b"."
    yield "a memo that is not there", b"h\x07."
    yield "a huge memo index", b"\x80\x04Nr\xff\xff\xff\x7f."
    yield "a string longer than the file", b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f"
    yield "bytes of 2^62", b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"."
    yield "a frame longer than the file", b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"N."
    yield "100,000 nested tuples", b"N" + b"\x85" * 100_000 + b"."
    yield "no UTF-8", b"\x80\x04\x8c\x02\xff\xfe."
    yield "an unhashable key", b"}]Ns."
    yield "a module that is not there", b"cno_such_module\nname\n."
    yield "a name that is no text", b"\x80\x04K\x01K\x02\x93."
    yield "an unknown opcode", b"\xff."
    yield "the wrong object", pickle.dumps({"a": 1})
    yield "an integer of a million digits", b"L" + b"9" * 1_000_000 + b"L\n."


def saved(pickled: bytes) -> bytes:
    """The file that torch.save would make of an object whose pickle is `pickled`."""
    buffer = io.BytesIO()
    torch.save(0, buffer)
    return with_pickle(buffer.getvalue(), pickled)


def with_pickle(archive: bytes, pickled: bytes, *, extra: dict[str, bytes] | None = None) -> bytes:
    """A torch.save file with another data.pkl, and with `extra` entries under any name."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        for info in source.infolist():
            is_pickle = info.filename.endswith("/data.pkl")
            target.writestr(info.filename, pickled if is_pickle else source.read(info))
        for name, content in (extra or {}).items():
            target.writestr(name, content)
    return out.getvalue()
