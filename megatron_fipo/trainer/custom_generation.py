"""The user's own generation (--custom-generate-function-path): tools, several turns; and the checks on what it returns.

It is a function of (requests, generate, tokenizer) that returns one Completion per request, with the request's uid.
`generate` draws from the engines. The function may be `async`; then `generate` is awaited, and what several tasks ask
at the same time goes to the engines together.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from megatron_fipo.data.prompts import Tokenizer
from megatron_fipo.trainer.generation import Generate, answers_to
from megatron_fipo.types import Completion, GenerateRequest
from megatron_fipo.user_function import load_user_function

FLAG = "--custom-generate-function-path"
CustomGenerate = Callable[..., Sequence[Completion] | Awaitable[Sequence[Completion]]]
LOGPROB_SLACK = 1e-3  # rounding may bring a log-prob above 0


def custom_generation(path: str, generate: Generate, tokenizer: Tokenizer) -> Generate:
    """The user's function as a Generate over the engines' `generate`. What it returns is checked, every time.

    Raises ValueError as `load_user_function`; the Generate raises ValueError naming the flag for a bad completion.
    """
    function = load_user_function(FLAG, path)
    takes_await = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object whose __call__ is async
    )

    def generate_and_check(requests: Sequence[GenerateRequest]) -> list[Completion]:
        if takes_await:
            return checked_completions(path, requests, asyncio.run(_awaited(function, requests, generate, tokenizer)))
        return checked_completions(path, requests, function(requests, generate, tokenizer))

    return generate_and_check


def checked_completions(path: str, requests: Sequence[GenerateRequest], completions: Any) -> list[Completion]:
    """The completions in request order, log-probs 0 where the mask is False. Raises ValueError naming the flag.

    Wanted is one Completion per request, each with as many log-probs and mask entries as tokens; finite log-probs <= 0
    where the policy drew the token, and at least one such token; no more tokens, a tool's included, than the request
    allows a response.
    """
    if not isinstance(completions, Sequence) or not all(isinstance(entry, Completion) for entry in completions):
        raise ValueError(f"{FLAG} {path} returned {_kind(completions)}, but must return a list of Completion")
    found = {str(completion.uid): completion for completion in completions}
    wanted = {request.uid for request in requests}
    if len(found) != len(completions) or found.keys() != wanted:
        raise ValueError(
            f"{FLAG} {path} returned {len(completions)} completions to {len(requests)} requests, but must return one "
            f"for each uid; {_named('missing', wanted - found.keys())}, {_named('unasked', found.keys() - wanted)}"
        )
    return [_checked(path, request, found[request.uid]) for request in requests]


async def _awaited(
    function: CustomGenerate, requests: Sequence[GenerateRequest], generate: Generate, tokenizer: Tokenizer
) -> Sequence[Completion]:
    result = function(requests, _SharedCalls(generate), tokenizer)
    assert inspect.isawaitable(result)
    return await result


_Call = tuple[list[GenerateRequest], "asyncio.Future[list[Completion]]"]


class _SharedCalls:
    """`generate` to be awaited by many tasks at once: whoever asks while the engines are busy goes into the next call,
    one call at a time. Requests of the same uid go into different calls, so that answers are not mixed up."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._waiting: list[_Call] = []
        self._server: asyncio.Task[None] | None = None

    async def __call__(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """The answers to `requests`, in their order. Raises ValueError when two of them share a uid."""
        if len({request.uid for request in requests}) != len(requests):
            raise ValueError(f"generate was given {len(requests)} requests, of which two share a uid")
        answer: asyncio.Future[list[Completion]] = asyncio.get_running_loop().create_future()
        self._waiting.append((list(requests), answer))
        if self._server is None or self._server.done():
            self._server = asyncio.create_task(self._serve())  # begins when every task that is ready has had its turn
        return await answer

    async def _serve(self) -> None:
        while self._waiting:
            taken: dict[str, GenerateRequest] = {}
            together: list[_Call] = []
            later: list[_Call] = []
            for call in self._waiting:
                fits = taken.keys().isdisjoint(request.uid for request in call[0])
                (together if fits else later).append(call)
                if fits:
                    taken.update((request.uid, request) for request in call[0])
            self._waiting = later
            try:
                completions = await asyncio.to_thread(answers_to, list(taken.values()), self._generate)
            except Exception as error:
                for _, answer in together:
                    if not answer.done():  # cancelled by its task
                        answer.set_exception(error)
                continue
            found = {completion.uid: completion for completion in completions}
            for requests, answer in together:
                if not answer.done():
                    answer.set_result([found[request.uid] for request in requests])


def _checked(path: str, request: GenerateRequest, completion: Completion) -> Completion:
    def require(condition: bool, found: str, wanted: str) -> None:
        if not condition:
            raise ValueError(f"{FLAG} {path}: completion {completion.uid}: {found}, but {wanted}")

    token_ids, logprobs = np.asarray(completion.token_ids), np.asarray(completion.logprobs)
    num_tokens, limit = len(token_ids) if token_ids.ndim else 0, request.sampling.max_response_len
    require(token_ids.ndim == 1, f"token_ids have shape {token_ids.shape}", "must be [R]")
    require(np.issubdtype(token_ids.dtype, np.integer), f"token_ids are {token_ids.dtype}", "must be int64")
    require(bool((token_ids >= 0).all()), f"a token id is {token_ids.min(initial=0)}", "must be >= 0")
    require(num_tokens <= limit, f"it has {num_tokens} tokens", f"at most {limit} are allowed, a tool's included")
    mask = np.ones(num_tokens, dtype=bool) if completion.loss_mask is None else np.asarray(completion.loss_mask)
    require(mask.dtype == np.bool_, f"loss_mask is {mask.dtype}", "must be bool")
    require(mask.shape == token_ids.shape, f"loss_mask has shape {mask.shape}", f"must be [{num_tokens}] as token_ids")
    require(bool(mask.any()), "loss_mask is False everywhere", "the policy must have drawn at least one token")
    require(logprobs.shape == token_ids.shape, f"logprobs have shape {logprobs.shape}", f"must be [{num_tokens}]")
    require(np.issubdtype(logprobs.dtype, np.floating), f"logprobs are {logprobs.dtype}", "must be fp32")
    drawn = logprobs[mask]
    require(bool(np.isfinite(drawn).all()), "a log-prob of a drawn token is not finite", "must be")
    require(bool((drawn <= LOGPROB_SLACK).all()), f"a log-prob is {drawn.max(initial=0):g}", "must be <= 0")
    require(
        completion.finish_reason in ("stop", "length"), f"finish_reason is {completion.finish_reason!r}", "stop|length"
    )
    version = completion.weight_version
    require(
        isinstance(version, int) and version >= 0,
        f"weight_version is {version!r}",
        "must be the one that generate gave",
    )
    return Completion(
        uid=completion.uid,
        token_ids=token_ids.astype(np.int64),
        logprobs=np.where(mask, logprobs, 0.0).astype(np.float32),
        finish_reason=completion.finish_reason,
        weight_version=version,
        loss_mask=mask,
    )


def _kind(value: Any) -> str:
    if not isinstance(value, Sequence):
        return f"a {type(value).__name__}"
    return f"a {type(value).__name__} that holds a " + next(
        type(entry).__name__ for entry in value if not isinstance(entry, Completion)
    )


def _named(what: str, uids: set[str]) -> str:
    return f"{what}: {', '.join(sorted(uids)[:3]) or 'none'}"
