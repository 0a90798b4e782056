"""A tiny random model with a tokenizer and a chat template, and a run of the program as a shell would start it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from processes import REPO_ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<end>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tiny_chat_model(directory: Path) -> Path:
    """A Llama of 3 layers and 9 heads over bytes, with random weights: its answers are noise."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=36,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=128,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`save_tiny_chat_model`'s directory. Not to be written to."""
    return save_tiny_chat_model(tmp_path_factory.mktemp("tiny") / "model")


class Launched:
    """A command in a process group of its own, as a terminal would start it, and everything it started."""

    def __init__(self, arguments: list[str], directory: Path) -> None:
        self.stderr_path = directory / "stderr.txt"
        self.stdout_path = directory / "stdout.txt"
        self.mark = f"TEST_LAUNCH={os.getpid()}-{time.monotonic_ns()}"
        with self.stderr_path.open("wb") as stderr, self.stdout_path.open("wb") as stdout:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=directory,
                env={
                    **os.environ,
                    "TORCHDYNAMO_DISABLE": "1",
                    "PYTHONPATH": python_path(directory),
                    "SPT_NOENV": "1",  # SGLang's setproctitle keeps the environment readable: pids() looks there
                }
                | dict([self.mark.split("=")]),
                process_group=0,
            )

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="replace")

    @property
    def stdout(self) -> str:
        return self.stdout_path.read_text(errors="replace")

    def pids(self) -> dict[int, str]:
        """Ids of the living processes that the command started, itself included, with their command lines."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def rank_pid(self, rank: int) -> int:
        """The id of the process that is this rank."""
        wanted = f"RANK={rank}".encode()
        for pid, command in self.pids().items():
            with contextlib.suppress(OSError):
                is_rank = wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if is_rank and "-m megatron_fipo.train" in command and "megatron_fipo.launch" not in command:
                    return pid
        raise AssertionError(f"no process is rank {rank} of {self.pids()}")

    def wait_for(self, what: str, ready: Callable[[], bool], timeout_s: float) -> None:
        """Return once `ready()`; AssertionError when the command ends first, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert self.process.poll() is None, f"ended before {what}:\n{self.stderr[-3000:]}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s:\n{self.stderr[-3000:]}"
            time.sleep(0.1)

    def wait(self, timeout_s: float) -> int:
        """The command's status. AssertionError when it or anything it started lives longer."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.stderr[-3000:]}") from None
        deadline = time.monotonic() + 3.0
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.pids(), f"left running: {self.pids()}"
        return status

    def end(self) -> None:
        """Kill whatever is left."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def python_path(directory: Path) -> str:
    """A PYTHONPATH on which `directory`, the tests' own modules and the package lie."""
    return os.pathsep.join([str(directory), str(REPO_ROOT)])


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts `python ARGUMENTS...` in the test's directory, or in the one given; kills what is left when it is over."""
    launched: list[Launched] = []

    def start(arguments: list[str], directory: Path | None = None) -> Launched:
        launched.append(Launched(arguments, directory or tmp_path))
        return launched[-1]

    yield start
    for command in launched:
        command.end()
