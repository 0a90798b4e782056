"""What runs on a rank: everything that a run writes is written to a disk that is full, read-only, or fails."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from actor_on_ranks import make_actor, make_groups
from safetensors.torch import load_file

from megatron_fipo.actor.checkpoint_files import CheckpointError, find_checkpoint, read_run_state, verify_checkpoint
from megatron_fipo.actor.checkpoint_saver import CheckpointSaver
from megatron_fipo.metrics.records import append_record, open_records, read_metrics
from megatron_fipo.trainer.evaluation_file import ResponseFile, blocks_of
from megatron_fipo.trainer.evaluation_result import EvaluatedProblem, EvaluatedResponse
from megatron_fipo.trainer.recording import read_rollouts, write_rollouts
from megatron_fipo.types import Group, Problem, Prompt, RewardResult, Sample
from megatron_fipo.weights.architecture import hf_shapes, read_architecture
from megatron_fipo.weights.hf_files import HFWeights, write_hf_checkpoint

CALLS = ("fsync", "rename", "replace", "mkdir")
Found = dict[str, dict[str, Any]]


def fail_everything(model_dir: str, directory: str, mounted: str | None, choice: bool) -> Found:
    """By case: the error, and whether what was there before is whole. `mounted`: a tmpfs of 8 MB of our own."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    actor = make_actor(model_dir, *make_groups())
    found: Found = {}
    for is_async in (False, True):
        writer = _Checkpoints(actor, Path(directory) / f"async {is_async}", is_async=is_async)
        found |= _of_writer(f"checkpoint{', asynchronous' * is_async}", writer, mounted, choice)
    for name, kind in (
        ("recording", _Recording),
        ("metrics", _Metrics),
        ("export", _Export),
        ("evaluation", _Responses),
    ):
        found |= _of_writer(name, kind(Path(directory) / name, model_dir), mounted, choice)
    return found


def _of_writer(name: str, writer: Any, mounted: str | None, choice: bool) -> Found:
    """`writer` has `write(number)`, `whole()` (what is there, checked) and `where` (its directory)."""
    found: Found = {}
    writer.write(1)
    number = 1

    def attempt(case: str, fault: contextlib.AbstractContextManager[Any]) -> None:
        nonlocal number
        before, error = writer.whole(), "no error"
        with fault:
            try:
                writer.write(number + 1)
            except (ValueError, OSError) as raised:
                error = f"{type(raised).__name__}: {raised}"
        after = writer.whole()
        if error == "no error":
            number += 1
        found[f"{name}: {case}"] = {"error": error, "before": before, "after": after, "where": str(writer.where)}
        writer.write(number + 1)  # the disk is well again
        number += 1
        found[f"{name}: {case}"]["then"] = writer.whole()

    counts = {call: _counted(call, lambda: writer.write(2)) for call in CALLS}
    number = 2
    for call, count in counts.items():
        for at in range(count)[:: 5 if choice else 1]:
            for code in (errno.EIO,) if choice else (errno.EIO, errno.ENOSPC, errno.EROFS):
                attempt(f"{call} {at + 1} of {count} fails with {errno.errorcode[code]}", _failing(call, at, code))
    for size in (0, 4096) if choice else (0, 1, 100, 1000, 4096, 20_000, 300_000):
        if size < writer.largest:
            attempt(f"no file beyond {size} bytes", _small_files(size))
    if mounted is not None:
        moved = writer.at(Path(mounted) / name.replace(",", ""))
        found |= _on_a_full_disk(name, moved, Path(mounted))
    return found


def _on_a_full_disk(name: str, writer: Any, mounted: Path) -> Found:
    found: Found = {}
    writer.write(1)
    ballast = mounted / "ballast"
    for part in (0.0, 0.3, 0.8):
        free = os.statvfs(mounted).f_bavail * os.statvfs(mounted).f_frsize
        ballast.write_bytes(bytes(max(int(free - part * writer.size), 0)))
        before, error = writer.whole(), "no error"
        try:
            writer.write(2)
        except (ValueError, OSError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        case = {"error": error, "before": before, "after": writer.whole(), "where": str(writer.where)}
        ballast.unlink()
        writer.write(3)
        found[f"{name}: disk full, room for {part:.0%}"] = {**case, "then": writer.whole()}
        writer.write(1)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    before, error = writer.whole(), "no error"
    try:
        writer.write(2)
    except (ValueError, OSError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    case = {"error": error, "before": before, "after": writer.whole(), "where": str(writer.where)}
    subprocess.run(["mount", "-o", "remount,rw", str(mounted)], check=True)
    writer.write(3)
    found[f"{name}: read-only directory"] = {**case, "then": writer.whole()}
    subprocess.run(["rm", "-rf", str(writer.where)], check=True)
    return found


class _Checkpoints:
    largest, size = 10**6, 1_400_000

    def __init__(self, actor: Any, where: Path, *, is_async: bool) -> None:
        self.actor, self.where, self.is_async = actor, where, is_async

    def at(self, where: Path) -> _Checkpoints:
        return _Checkpoints(self.actor, where, is_async=self.is_async)

    def write(self, number: int) -> None:
        saver = CheckpointSaver(self.actor, self.where, is_async=self.is_async, keep_last=2, say=lambda line: None)
        try:
            saver.save(number, {"number": number})
            saver.finish()
        finally:
            saver.close()

    def whole(self) -> str:
        try:
            directory = find_checkpoint(self.where)
            verify_checkpoint(directory)
            for other in self.where.glob("step_*"):
                verify_checkpoint(other)
            return str(read_run_state(directory)["trainer"]["number"])
        except CheckpointError as error:
            return f"BROKEN: {error}"


class _Recording:
    largest, size = 100_000, 100_000

    def __init__(self, where: Path, model_dir: str) -> None:
        self.where, self.model_dir = where, model_dir

    def at(self, where: Path) -> Any:
        return type(self)(where, self.model_dir)

    def write(self, number: int) -> None:
        write_rollouts(str(self.where), 7, [_group(number)], {})

    def whole(self) -> str:
        (group,), _ = read_rollouts(str(self.where), 7)
        return str(int(group.samples[0].reward))


class _Metrics(_Recording):
    """One line after the other; what cannot be written whole is dropped by the next start."""

    largest, size = 100, 100

    def write(self, number: int) -> None:
        self.where.mkdir(parents=True, exist_ok=True)
        num_steps = self._path.read_bytes().count(b"\n") if self._path.exists() else 0
        file = open_records(self._path, resume_step=num_steps)
        try:
            append_record(file, {"step": num_steps + 1, "number": number, "text": "x" * 50_000})
        finally:
            with contextlib.suppress(OSError):
                file.close()

    def whole(self) -> str:
        return str(self._records()[-1]["number"])

    @property
    def _path(self) -> Path:
        return self.where / "metrics.jsonl"

    def _records(self) -> list[dict[str, Any]]:
        """As far as the file has whole lines."""
        content = self._path.read_bytes()
        aside = Path(tempfile.gettempdir()) / f"records-{os.getpid()}"
        aside.write_bytes(content[: content.rfind(b"\n") + 1])
        try:
            return read_metrics(aside)
        finally:
            aside.unlink()


class _Export(_Recording):
    largest, size = 100_000, 400_000

    def write(self, number: int) -> None:
        shapes = hf_shapes(read_architecture(self.model_dir))
        tensors = ((name, torch.full(shape, float(number))) for name, shape in shapes.items())
        write_hf_checkpoint(self.where / "out", self.model_dir, tensors, max_shard_bytes=200_000)

    def whole(self) -> str:
        weights = HFWeights(self.where / "out")
        values = {float(bound) for name in weights.names for bound in weights.read(name).aminmax()}
        assert len(values) == 1, values
        assert all(load_file(path) for path in (self.where / "out").glob("*.safetensors"))
        return str(int(values.pop()))


class _Responses(_Recording):
    largest, size = 100, 60_000

    def write(self, number: int) -> None:
        prompts = [Prompt(Problem(f"p:{i}", "?", "1"), np.array([1])) for i in range(400)]
        with ResponseFile(self.where, {"--seed": 1}, blocks_of({"set": prompts}, 1), 1) as file:
            uid = prompts[len(file.finished)].problem.uid
            response = EvaluatedResponse("x" * 50_000, number, "stop", 1.0, 1.0, "1")
            file.append([EvaluatedProblem(uid, "?", "1", (response,))])

    def whole(self) -> str:
        prompts = [Prompt(Problem(f"p:{i}", "?", "1"), np.array([1])) for i in range(400)]
        try:
            with ResponseFile(self.where, {"--seed": 1}, blocks_of({"set": prompts}, 1), 1) as file:
                return str(file.finished[-1][0].responses[0].num_tokens)
        except OSError:  # a read-only directory
            return "cannot be opened"


def _group(number: int) -> Group:
    size = 5000
    sample = Sample(
        uid="p/0",
        response_ids=np.arange(size),
        rollout_logprobs=np.full(size, -0.5, dtype=np.float32),
        loss_mask=np.ones(size, dtype=bool),
        token_versions=np.zeros(size, dtype=np.int64),
        finish_reason="stop",
        text="",
        result=RewardResult(float(number), 1.0, None),
        reward=float(number),
    )
    return Group(Prompt(Problem("p", "?", "1"), np.array([1, 2])), (sample,))


def _counted(call: str, function: Callable[[], None]) -> int:
    """How often `function` makes an operating system's call."""
    count, original = 0, getattr(os, call)

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        return original(*arguments, **keywords)

    setattr(os, call, counted)
    try:
        function()
    finally:
        setattr(os, call, original)
    return count


@contextlib.contextmanager
def _failing(call: str, at: int, code: int) -> Iterator[None]:
    """The call number `at` to os.`call` fails."""
    count, original = 0, getattr(os, call)

    def failing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        if count == at + 1:
            raise OSError(code, os.strerror(code))
        return original(*arguments, **keywords)

    setattr(os, call, failing)
    try:
        yield
    finally:
        setattr(os, call, original)


@contextlib.contextmanager
def _small_files(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
