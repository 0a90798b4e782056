"""A small training run of the real program on recorded rollouts, run with faults, and compared bit for bit.

It has everything that a resumed run must bring back: AdamW's moments, a learning-rate warm-up under way, a frozen
reference model, random states; and several updates a step.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from fake_rollouts import Engine, make_collector
from fault_program import DONE, ENGINE
from fork_server import ForkedRun, ForkServer
from megatron.core.safe_globals import register_safe_globals
from processes import rank_environment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.checkpoint import FileSystemReader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_fipo.rollout.server_process import start_engine
from megatron_fipo.rollout.sglang_engine import SGLangEngine
from megatron_fipo.trainer.recording import write_rollouts
from megatron_fipo.types import GenerateRequest, SamplingSettings

NUM_STEPS, SAVE_INTERVAL = 5, 2
NUM_RECORDED = 60  # for longer runs
SAVED_STEPS = (2, 4, 5)
RUN_WITHIN_S = 120.0
MAX_RESPONSE_LEN = 24
REPLAYED_FLAGS: dict[str, Any] = {
    "rm-type": "exact",
    "rollout-batch-size": 4,
    "n-samples-per-prompt": 4,
    "num-updates-per-rollout": 2,
    "rollout-max-prompt-len": 32,
    "rollout-max-response-len": MAX_RESPONSE_LEN,
    "max-tokens-per-micro-batch": 128,
    "overlong-buffer-len": 4,
    "kl-coef": 0.01,
    "lr": 1e-3,
    "lr-warmup-iters": 6,
    "train-iters": NUM_STEPS,
    "save": "checkpoints",
    "save-interval": SAVE_INTERVAL,
    "output-dir": "out",
}
LIVE_FLAGS: dict[str, Any] = {
    "rm-type": None,
    "custom-rm-path": "own_reward:grade",
    "eval-interval": 3,
    "over-sampling-batch-size": 7,
    "partial-rollout-len": 16,
    "partial-rollout-older-tokens": "correct",
    "use-tis": True,
}
REWARD = """
from megatron_fipo.types import RewardResult

def grade(response, ground_truth, **extra):
    score = float(len(response) % 2)
    return RewardResult(score, score, response)
"""
NOT_REPEATED = ("time/", "tokens_per_s", "memory")  # in the names of what depends on the machine's mood
RECORDS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl")
COMMON = "common.pt"
# files of a checkpoint whose bytes say more than they hold: the order of writing, or which objects are one
COMPARED_BY_VALUE = (".metadata", "manifest.json", COMMON)


@dataclass(frozen=True)
class Ended:
    """How the ranks of a run ended (negative: by a signal), and the faults that really happened."""

    statuses: list[int]
    stderr: str
    faults: list[str]
    seconds: float


@dataclass(frozen=True)
class Runs:
    """Where runs find their model and recordings, and the server that they are forked by."""

    server: ForkServer
    inputs: Path
    num_ranks: int = 1
    flags: Mapping[str, Any] = field(default_factory=dict)
    engine: SGLangEngine | None = None  # generates; None: recorded rollouts are replayed

    def start(self, directory: Path, faults: Sequence[Mapping[str, Any]] = (), **more: Any) -> Started:
        """The program as `num_ranks` processes in `directory`, with `faults` and flags `more`, under way."""
        directory.mkdir(parents=True, exist_ok=True)
        arguments = arguments_of({**self.input_flags(), **REPLAYED_FLAGS, **self.flags, **_flags(more)})
        (directory / "own_reward.py").write_text(REWARD)
        done = directory / "faults-done.txt"
        for path in directory.glob(f"{done.name}*"):
            path.unlink()
        store = torch.distributed.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=RUN_WITHIN_S)
        )
        env = {"TORCHDYNAMO_DISABLE": "1", "SPT_NOENV": "1", DONE: str(done)}
        if self.engine is not None:
            env[ENGINE] = json.dumps(asdict(self.engine.address))
        ranks = [
            self.server.start(arguments, faults, directory, rank_environment(rank, self.num_ranks, store.port, env))
            for rank in range(self.num_ranks)
        ]
        return Started(ranks, store, done)

    def run(self, directory: Path, faults: Sequence[Mapping[str, Any]] = (), **more: Any) -> Ended:
        """`start`, and wait for the end. When a rank fails, the others are ended as torchrun would end them."""
        return self.start(directory, faults, **more).wait()

    def on_ranks(self, num_ranks: int, **flags: Any) -> Runs:
        """The same runs on another number of ranks, with `flags` more."""
        return replace(self, num_ranks=num_ranks, flags={**self.flags, **_flags(flags)})

    def with_engine(self, engine: SGLangEngine) -> Runs:
        """The same runs, but generating and evaluating, with groups and unfinished responses left over at each step."""
        return replace(self, engine=engine, flags={**self.flags, **LIVE_FLAGS})

    def input_flags(self) -> dict[str, Any]:
        model, problems = self.inputs / "model", self.inputs / "problems.jsonl"
        if self.engine is not None:
            return {"hf-checkpoint": model, "prompt-data": problems, "eval-prompt-data": self.inputs / "held_out.jsonl"}
        return {"hf-checkpoint": model, "prompt-data": problems, "replay-rollouts": self.inputs / "rollouts"}


@dataclass(frozen=True)
class Started:
    """A run under way."""

    ranks: list[ForkedRun]
    store: torch.distributed.TCPStore
    done: Path
    began: float = field(default_factory=time.monotonic)

    def wait(self, timeout_s: float = RUN_WITHIN_S, *, grace_s: float = 20.0) -> Ended:
        """As a launcher does: when one rank fails the others get SIGTERM, and after `grace_s` SIGKILL."""
        deadline = time.monotonic() + timeout_s
        told = False
        while any(rank.poll() is None for rank in self.ranks):
            for waiting in [rank for rank in self.ranks if rank.poll() is None][:1]:
                waiting.poll(0.05)
            if not told and any(rank.poll() for rank in self.ranks):
                told, deadline = True, min(deadline, time.monotonic() + grace_s)
                self.signal(signal.SIGTERM)
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                if not told:
                    raise AssertionError(f"still running after {timeout_s} s:\n{self.stderr[-3000:]}")
        statuses = [rank.poll() for rank in self.ranks]
        faults = self.done.read_text().splitlines() if self.done.exists() else []
        return Ended([status for status in statuses if status is not None], self.stderr, faults, self.seconds)

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to these ranks (None: all) that still run."""
        for index, rank in enumerate(self.ranks):
            if (ranks is None or index in ranks) and rank.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, number)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def stderr(self) -> str:
        return "".join(rank.stderr for rank in self.ranks)


def arguments_of(flags: Mapping[str, Any]) -> list[str]:
    """A mapping as a command line; True is a flag without a value, False and None no flag."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False and value is not None:
            words += [f"--{name}", str(value)]
    return words


def _flags(more: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in more.items()}


# ---- what a run needs


def write_inputs(directory: Path) -> Path:
    """A tiny model, problems, and recorded rollouts drawn by a stand-in for an engine."""
    save_tiny_model(directory / "model")
    problems = [{"prompt": f"{i} + {i} = ", "label": str(2 * i)} for i in range(40)]
    for name, part in (("problems", problems[:-4]), ("held_out", problems[-4:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in part))
    engine = Engine(_is_right)
    collector = make_collector(
        engine,
        rollout_batch_size=REPLAYED_FLAGS["rollout-batch-size"],
        generation_batch_size=6,
        sampling=SamplingSettings(max_response_len=MAX_RESPONSE_LEN),
    )
    for step in range(1, NUM_RECORDED + 1):
        engine.weight_version = step - 1
        write_rollouts(str(directory / "rollouts"), step, *collector.collect(step))
    return directory


def _is_right(request: GenerateRequest) -> bool:
    return (request.seed // 7) % 3 == 0


def save_tiny_model(directory: Path) -> Path:
    """A Llama of 2 layers and 4 heads over bytes with random weights, small enough for steps of milliseconds."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=[fast.eos_token_id, *range(33, 59)],  # a fair part of the bytes: responses differ in length
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


# ---- what a run came to


def differences(found: Path, wanted: Path) -> list[str]:
    """What differs between two finished runs: records (loss, sample ids ...) and every byte of the last checkpoint."""
    lines = []
    for name in RECORDS:
        lines += [f"{name}: {line}" for line in record_differences(records(found, name), records(wanted, name))]
    return lines + checkpoint_differences(last_checkpoint(found), last_checkpoint(wanted))


def records(directory: Path, name: str) -> list[dict[str, Any]]:
    """The records of a run without what no run repeats."""
    text = (directory / "out" / name).read_text(encoding="utf-8")
    return [
        {key: value for key, value in json.loads(line).items() if not any(part in key for part in NOT_REPEATED)}
        for line in text.splitlines()
    ]


def record_differences(found: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every value in which two lists of records differ."""
    lines = [] if len(found) == len(wanted) else [f"{len(found)} records, but {len(wanted)} wanted"]
    for ours, theirs in zip(found, wanted):
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                lines.append(f"step {theirs['step']}: {name} is {ours.get(name)}, not {theirs.get(name)}")
    return lines


def last_checkpoint(directory: Path) -> Path:
    root = directory / "checkpoints"
    return root / (root / "latest").read_text().strip()


def checkpoint_differences(found: Path, wanted: Path) -> list[str]:
    """Files of two checkpoints of one layout that differ in a byte, and tensors that lie elsewhere."""
    hashes = [
        {path.name: _sha256(path) for path in sorted(directory.iterdir()) if path.name not in COMPARED_BY_VALUE}
        for directory in (found, wanted)
    ]
    names = sorted(hashes[0].keys() | hashes[1].keys())
    lines = [f"checkpoint: {name}" for name in names if hashes[0].get(name) != hashes[1].get(name)]
    common = [list(_leaves(_load_common(directory / COMMON), "")) for directory in (found, wanted)]
    lines += [f"checkpoint: {COMMON}: {ours}, not {theirs}" for ours, theirs in zip(*common) if ours != theirs]
    if len(common[0]) != len(common[1]):
        lines.append(f"checkpoint: {COMMON}: {len(common[0])} values, not {len(common[1])}")
    layouts = [FileSystemReader(directory).read_metadata() for directory in (found, wanted)]
    for part in ("state_dict_metadata", "storage_data"):
        if getattr(layouts[0], part) != getattr(layouts[1], part):
            lines.append(f"checkpoint: .metadata: {part}")
    return lines


def _load_common(path: Path) -> Any:
    register_safe_globals()
    return torch.load(path, weights_only=True)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Names and exact values of all that nested dictionaries and lists hold, in order."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{name}/{index}")
    elif isinstance(value, torch.Tensor):
        yield name, f"{value.dtype} {tuple(value.shape)} {value.reshape(-1).tolist()}"
    else:
        yield name, repr(value)


def committed_steps(directory: Path) -> list[int]:
    """The steps of which the run's checkpoint directory holds a whole checkpoint by its name."""
    return sorted(int(path.name.split("_")[1].split(".")[0]) for path in (directory / "checkpoints").glob("step_*"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def steps_done(directory: Path) -> int:
    """How many steps the run's log holds."""
    path = directory / "out" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@contextlib.contextmanager
def live_engine(inputs: Path, directory: Path) -> Iterator[SGLangEngine]:
    """A real engine on the runs' model, which outlives the runs that use it."""
    engine = start_engine(
        str(inputs / "model"),
        name="engine-0",
        dtype="float32",
        tp_size=1,
        context_length=96,
        random_seed=0,
        log_path=str(directory / "engine-0.log"),
        start_timeout_s=240.0,
        request_timeout_s=120.0,
        server_args={"max_total_tokens": 8192},
        use_cpu=True,
    )
    try:
        engine.wait_ready()
        yield engine
    finally:
        engine.shutdown()


@contextlib.contextmanager
def fork_server() -> Iterator[ForkServer]:
    """A server whose copies have the environment of a rank."""
    env = {**rank_environment(0, 1, 0, None), "TORCHDYNAMO_DISABLE": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        env.pop(name)
    with ForkServer(env) as server:
        yield server
