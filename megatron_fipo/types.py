"""Plain data that travels between the floors: problems, samples, groups, packed batches. No behaviour beyond checks.

Per-token arrays are aligned to the predicting position: entry i is about token i + 1, so the last entry of every
sequence, like all padding, has mask 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:  # grader processes import this module and must stay light
    from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Problem:
    """A question and what is needed to grade an answer to it, before tokenisation.

    `prompt` is plain text or a tuple of chat messages `{"role": ..., "content": ...}`. `response_prefix` is text the
    assistant is made to begin with (part of the prompt, never of the response). `uid` is unique within its source and
    stable across runs. `extra` goes to the reward as keyword arguments.
    """

    uid: str
    prompt: str | tuple[Mapping[str, str], ...]
    ground_truth: str
    response_prefix: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A tokenised problem: `token_ids` [P] int64 is everything the engine is given."""

    problem: Problem
    token_ids: np.ndarray


@dataclass(frozen=True)
class SamplingSettings:
    """How the engine draws tokens. `top_k` -1 is off. `temperature` 0 is greedy."""

    max_response_len: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1


@dataclass(frozen=True, eq=False)
class GenerateRequest:
    """One response to draw: the same `seed`, prompt and weights ask for the same response."""

    uid: str
    prompt_ids: np.ndarray  # [P] int64
    sampling: SamplingSettings
    seed: int  # 0 <= seed < 2**31


@dataclass(frozen=True, eq=False)
class Completion:
    """What an engine answered to one request.

    `token_ids` [R] int64 includes the end-of-turn token when the model emitted one (finish_reason "stop").
    `logprobs` [R] fp32 are the engine's own, at the request's temperature. `loss_mask` [R] bool is False for tokens
    that the policy did not draw (a tool's output, put there by the user's own rollout function; log-prob 0); None: it
    drew all of them.
    """

    uid: str
    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    weight_version: int
    loss_mask: np.ndarray | None = None


@dataclass(frozen=True)
class RewardResult:
    """A grader's verdict on one response. `score` is without the overlong penalty; `accuracy` lies in [0, 1];
    `answer` is the extracted answer, or None when there was none."""

    score: float
    accuracy: float
    answer: str | None


@dataclass(frozen=True)
class GraderError:
    """A grader that raised, timed out, crashed or overran its memory: never a wrong label, always visible."""

    kind: Literal["exception", "timeout", "crash", "memory"]
    message: str


@dataclass(frozen=True, eq=False)
class Sample:
    """One response and its verdict. `reward` = `result.score` + overlong penalty, what the advantage is made of.

    A `result` that is a GraderError (--on-reward-error drop) makes a sample that nothing is learned from: it takes no
    part in its group's mean and spread, its reward (0) is not read, its tokens are masked.
    """

    uid: str  # f"{problem.uid}/{sample_index}"
    response_ids: np.ndarray  # [R] int64
    rollout_logprobs: np.ndarray  # [R] fp32, the engine's
    loss_mask: np.ndarray  # [R] bool, False for tokens that the policy did not draw
    token_versions: np.ndarray  # [R] int64, the version of the weights that drew each token
    finish_reason: FinishReason
    text: str  # the response decoded without special tokens
    result: RewardResult | GraderError
    reward: float


@dataclass(frozen=True, eq=False)
class Group:
    """The G samples of one prompt."""

    prompt: Prompt
    samples: tuple[Sample, ...]


@dataclass(frozen=True, eq=False)
class TrainSequence:
    """One prompt and response as the trainer sees it. L = prompt + response tokens; all [L] arrays are aligned to the
    predicting position. The mask may have holes (tool output) and a masked prefix (the prompt)."""

    uid: str
    token_ids: np.ndarray  # [L] int64
    loss_mask: np.ndarray  # [L] bool; the last entry is False
    advantages: np.ndarray  # [L] fp32
    rollout_logprobs: np.ndarray  # [L] fp32, 0 where the mask is False
    token_versions: np.ndarray  # [L] int64, of the weights that drew the predicted token; -1 where the mask is False


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A micro-batch: sequences laid end to end without padding, except one dummy sequence of mask 0 at the end when the
    layout wants the rows to be a multiple of something (sequence parallelism), or nothing else is in it.

    T counts the tokens of all sequences; S <= T counts the rows the model computes: a prompt that several sequences of
    the batch begin with is computed once. `rows` and `positions_of_rows` lead from one to the other.

    Under context parallelism every sequence is padded at its end to a multiple of 2 cp tokens, `cu_seqlens` are the
    offsets of the whole padded pack, and every other tensor is this rank's share of it (ops/zigzag.py): T and S count
    local tokens.
    """

    token_ids: Tensor  # [S] int64
    position_ids: Tensor  # [S] int64, restarts at every sequence
    rows: Tensor  # [T] int64, the row of each token
    positions_of_rows: Tensor  # [S] int64, one of the tokens (an index into T) whose row it is
    labels: Tensor  # [T] int64, the next token; 0 at a sequence's last position
    cu_seqlens: Tensor  # [num_seqs + 1] int32, first 0, last T * cp
    loss_mask: Tensor  # [T] bool
    advantages: Tensor  # [T] fp32
    rollout_logprobs: Tensor  # [T] fp32
    old_logprobs: Tensor | None  # [T] fp32; None before the old log-prob pass
    reference_logprobs: Tensor | None  # [T] fp32, of the initial weights; None without a KL term
    members: tuple[int, ...]  # index of each real sequence in the list that was packed, in pack order
