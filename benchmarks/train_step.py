"""Our log-prob pass and update beside transformers' forward and backward: same model, dtype, threads and sequences.

One process, alternating between the contestants; medians after warm-up. The transformers side is run in three plain
ways (a padded batch with all logits, a padded batch with the responses' logits only, one sequence at a time) and the
fastest is the baseline.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_fipo.types import TrainSequence

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GOAL = 0.9


@dataclass(frozen=True)
class Shape:
    """One mini-batch: prompts of `prompt_len` and responses of `response_len` tokens, both (lowest, highest)."""

    name: str
    num_sequences: int
    prompt_len: tuple[int, int]
    response_len: tuple[int, int]


SHAPES = (
    Shape("quickstart: 16 x (45 + 2-8)", 16, (44, 46), (2, 8)),
    Shape("long answers: 8 x (56 + 200)", 8, (56, 56), (200, 200)),
)


@dataclass(frozen=True)
class Contestant:
    """The same work done one way: `logprobs` forward only, `gradients` forward and backward, `update` with Adam."""

    name: str
    logprobs: Callable[[], object]
    gradients: Callable[[], object]
    update: Callable[[], object]


def main() -> None:
    """Measure and print one table."""
    options = _parse()
    torch.set_num_threads(options.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ours = OursFactory(options.hf_checkpoint, DTYPES[options.dtype], options.max_tokens_per_micro_batch)
    theirs = TransformersFactory(options.hf_checkpoint, DTYPES[options.dtype])
    print(f"{options.dtype}, {options.threads} thread(s), medians of {options.repeats} after {options.warmup} warm-ups")
    for shape in SHAPES:
        sequences = make_sequences(shape, vocab_size=theirs.vocab_size)
        contestants = [ours.contestant(sequences), *theirs.contestants(sequences)]
        num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
        print(f"\n{shape.name}, {num_tokens} tokens; tokens/s (CPU-seconds in brackets)")
        print_table(measure(contestants, options.warmup, options.repeats), num_tokens)
    dist.destroy_process_group()


def make_sequences(shape: Shape, *, vocab_size: int) -> list[TrainSequence]:
    """Random tokens in the shape's lengths; the loss is on the response, the advantages alternate in sign."""
    rng = np.random.default_rng(0)
    sequences = []
    for index in range(shape.num_sequences):
        prompt_len = int(rng.integers(shape.prompt_len[0], shape.prompt_len[1] + 1))
        length = prompt_len + int(rng.integers(shape.response_len[0], shape.response_len[1] + 1))
        mask = np.zeros(length, dtype=bool)
        mask[prompt_len - 1 : length - 1] = True
        sequences.append(
            TrainSequence(
                uid=str(index),
                token_ids=rng.integers(0, vocab_size, length),
                loss_mask=mask,
                advantages=np.full(length, (-1.0) ** index, dtype=np.float32),
                rollout_logprobs=np.zeros(length, dtype=np.float32),
                token_versions=np.where(mask, 0, -1),
            )
        )
    return sequences


class OursFactory:
    """Our actor on one rank, and the work it does on given sequences."""

    def __init__(self, model_dir: str, dtype: torch.dtype, max_tokens_per_micro_batch: int) -> None:
        from megatron_fipo.actor.actor import build_actor
        from megatron_fipo.actor.setup import initialize_model_parallel
        from megatron_fipo.parallel import ParallelLayout
        from megatron_fipo.patches.megatron_cpu import apply_patches
        from megatron_fipo.weights.architecture import read_architecture
        from megatron_fipo.weights.hf_files import HFWeights

        apply_patches()
        layout = ParallelLayout.for_world(1, 0)
        self.actor = build_actor(
            read_architecture(model_dir),
            HFWeights(model_dir),
            layout,
            initialize_model_parallel(layout, seed=1, timeout_minutes=5),
            params_dtype=dtype,
            device=torch.device("cpu"),
            transformer_impl="local",
            transformer={},
            ddp={},
            optimizer={"lr": 1e-6, "weight_decay": 0.0, "clip_grad": 1.0},
            lr_warmup_iters=0,
            max_tokens_per_micro_batch=max_tokens_per_micro_batch,
            max_response_len=256,
        )

    def contestant(self, sequences: list[TrainSequence]) -> Contestant:
        """FIPO on these sequences."""
        from megatron_fipo.actor import pipeline
        from megatron_fipo.config import CorrectionSettings, FIPOSettings

        actor, settings = self.actor, FIPOSettings()
        objective = pipeline.Objective("fipo", settings, CorrectionSettings(), actor.max_response_len)
        old_logprobs, _ = actor.old_logprobs([sequences])

        def gradients() -> None:
            actor.chunks[0].zero_grad_buffer()
            pipeline.accumulate_gradients(
                actor.chunks,
                actor._packed(sequences, old_logprobs),
                objective,
            )

        return Contestant(
            "megatron_fipo",
            lambda: actor.old_logprobs([sequences]),
            gradients,
            lambda: actor.update(sequences, old_logprobs, algorithm="fipo", settings=settings),
        )


class TransformersFactory:
    """The same model from transformers with SDPA attention, and three plain ways to score and train it."""

    def __init__(self, model_dir: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa")
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        self.vocab_size = self.model.config.vocab_size

    def contestants(self, sequences: list[TrainSequence]) -> list[Contestant]:
        """Padded with all logits, padded with the responses' logits only, one sequence at a time."""
        num_kept = sum(int(sequence.loss_mask.sum()) for sequence in sequences)
        whole = _padded(sequences)
        longest = max(int(sequence.loss_mask.sum()) for sequence in sequences)
        singles = [_padded([sequence]) for sequence in sequences]
        ways = {
            "transformers, padded": [(whole, None)],
            "transformers, padded, response logits": [(whole, longest + 1)],
            "transformers, one by one": [
                (single, int(sequence.loss_mask.sum()) + 1) for single, sequence in zip(singles, sequences)
            ],
        }
        return [self._contestant(name, batches, num_kept) for name, batches in ways.items()]

    def _contestant(self, name: str, batches: list[tuple[dict[str, Tensor], int | None]], num_kept: int) -> Contestant:
        def logprobs() -> list[Tensor]:
            with torch.no_grad():
                return [self._logprobs(batch, keep)[0] for batch, keep in batches]

        def gradients() -> None:
            self.optimizer.zero_grad()
            for batch, keep in batches:
                scores, mask, advantages = self._logprobs(batch, keep)
                ratio = (scores - scores.detach()).exp()
                (-(ratio * advantages * mask).sum() / num_kept).backward()

        def update() -> None:
            gradients()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()

        return Contestant(name, logprobs, gradients, update)

    def _logprobs(self, batch: dict[str, Tensor], keep: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, loss mask and advantages, each [B, keep - 1], of the last `keep` positions (None: of all)."""
        length = batch["token_ids"].size(1)
        keep = length if keep is None else keep
        logits = self.model(
            input_ids=batch["token_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
            logits_to_keep=keep,
        ).logits
        labels = batch["token_ids"][:, length - keep + 1 :]
        scores = torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(2, labels[:, :, None])[:, :, 0]
        window = slice(length - keep, length - 1)
        return scores, batch["loss_mask"][:, window], batch["advantages"][:, window]


def _padded(sequences: list[TrainSequence]) -> dict[str, Tensor]:
    """Left-padded batch of [B, L] tensors, so that responses end together."""
    longest = max(len(sequence.token_ids) for sequence in sequences)

    def rows(arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack([np.pad(array, (longest - len(array), 0)) for array in arrays]))

    return {
        "token_ids": rows([s.token_ids for s in sequences]),
        "attention_mask": rows([np.ones(len(s.token_ids), dtype=np.int64) for s in sequences]),
        "position_ids": rows([np.arange(len(s.token_ids)) for s in sequences]),
        "loss_mask": rows([s.loss_mask.astype(np.float32) for s in sequences]),
        "advantages": rows([s.advantages for s in sequences]),
    }


def measure(contestants: list[Contestant], warmup: int, repeats: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Median (wall seconds, CPU seconds) per contestant and kind of work; contestants take turns."""
    kinds = ("logprobs", "gradients", "update")
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for repeat in range(warmup + repeats):
        for kind in kinds:
            for contestant in contestants:
                wall, cpu = time.perf_counter(), time.process_time()
                getattr(contestant, kind)()
                taken = (time.perf_counter() - wall, time.process_time() - cpu)
                if repeat >= warmup:
                    times.setdefault((contestant.name, kind), []).append(taken)
    return {
        contestant.name: {
            kind: (
                statistics.median(wall for wall, _ in times[contestant.name, kind]),
                statistics.median(cpu for _, cpu in times[contestant.name, kind]),
            )
            for kind in kinds
        }
        for contestant in contestants
    }


def print_table(seconds: dict[str, dict[str, tuple[float, float]]], num_tokens: int) -> None:
    """One row per contestant, then ours over the fastest of the others."""
    columns = {"logprobs": "log-probs", "gradients": "forward+backward", "update": "with optimizer"}
    width = max(map(len, seconds)) + 2
    print(" " * width + "".join(f"{title:>24}" for title in columns.values()))
    for name, row in seconds.items():
        cells = [f"{num_tokens / row[kind][0]:.0f} ({row[kind][1]:.2f} s)" for kind in columns]
        print(f"{name:<{width}}" + "".join(f"{cell:>24}" for cell in cells))
    ours, *others = seconds.values()
    for title, clock in (("ratio", 0), ("ratio in CPU-seconds", 1)):
        ratios = [min(row[kind][clock] for row in others) / ours[kind][clock] for kind in columns]
        print(f"{title:<{width}}" + "".join(f"{ratio:>24.2f}" for ratio in ratios))
    print(f"{'goal':<{width}}" + "".join(f"{f'>= {GOAL}':>24}" for _ in range(2)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-checkpoint", required=True, help="directory of the model")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--threads", type=int, default=1, help="threads, pinned to as many cores")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--max-tokens-per-micro-batch", type=int, default=1024, help="of ours")
    return parser.parse_args()


if __name__ == "__main__":
    main()
