"""From a problem to the token ids an engine is given: chat template, response prefix, length check."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megatron_fipo.types import Problem, Prompt

# Stands for a special token's spelling while the chat template runs; private-use characters that no text has reason to
# hold and no template trims.
PLACEHOLDER = "\uf8ff{}\uf8fe"
PLACEHOLDER_PATTERN = re.compile("\uf8ff([0-9]+)\uf8fe")


class Tokenizer(Protocol):
    """What this project asks of a Hugging Face tokenizer."""

    chat_template: Any
    bos_token: str | None

    def encode(self, text: str, **options: Any) -> list[int]:
        """Token ids; options used: add_special_tokens, split_special_tokens."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """Text; option used: skip_special_tokens."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
        """The rendered conversation; options used: tokenize=False, add_generation_prompt=True."""

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Added tokens by id, each with `content` and `special`."""


def tokenize_problem(
    problem: Problem, tokenizer: Tokenizer, *, apply_chat_template: bool, max_prompt_len: int
) -> Prompt:
    """The problem as token ids: its prompt, then `response_prefix` as the beginning of the assistant's turn.

    Chat messages always go through the tokenizer's chat template, a text only with `apply_chat_template` (as the
    user's message). What a message says stays text: a special token spelled in it is not that token. A plain text is
    taken as already rendered, special tokens included; the tokenizer's begin-of-sequence token is added unless the
    text starts with it.

    Raises ValueError when the tokenizer has no chat template or the template refuses the messages, for an empty
    prompt, and for one of more than `max_prompt_len` tokens (--rollout-max-prompt-len).
    """
    if not problem.prompt:
        raise ValueError(f"problem {problem.uid}: the prompt is empty")
    if isinstance(problem.prompt, str) and not apply_chat_template:
        begins_itself = bool(tokenizer.bos_token) and problem.prompt.startswith(str(tokenizer.bos_token))
        ids = tokenizer.encode(problem.prompt, add_special_tokens=not begins_itself)
    else:
        ids = _encode_chat(problem, tokenizer)
    if problem.response_prefix:
        ids = ids + tokenizer.encode(problem.response_prefix, add_special_tokens=False)
    if not ids:
        raise ValueError(f"problem {problem.uid}: the tokenizer makes no token of its prompt {problem.prompt!r}")
    if len(ids) > max_prompt_len:
        raise ValueError(
            f"problem {problem.uid}: the prompt has {len(ids)} tokens, but --rollout-max-prompt-len allows "
            f"{max_prompt_len}"
        )
    return Prompt(problem, np.asarray(ids, dtype=np.int64))


def _encode_chat(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError(
            f"problem {problem.uid}: its prompt is for a chat template (messages, or --apply-chat-template), but the "
            "tokenizer in --hf-checkpoint has none"
        )
    prompt = problem.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    spellings = _special_spellings(tokenizer)
    hidden: list[str] = []

    def hide(match: re.Match[str]) -> str:
        hidden.append(match.group())
        return PLACEHOLDER.format(len(hidden) - 1)

    if spellings is not None:
        messages = [{**message, "content": spellings.sub(hide, message["content"])} for message in messages]
    text = _render(problem, tokenizer, messages)
    if not hidden:
        return tokenizer.encode(text, add_special_tokens=False)
    ids: list[int] = []
    for i, piece in enumerate(PLACEHOLDER_PATTERN.split(text)):  # text, number, text, number, ..., text
        if i % 2:
            ids += tokenizer.encode(hidden[int(piece)], add_special_tokens=False, split_special_tokens=True)
        elif piece:
            ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


def _render(problem: Problem, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    from jinja2 import TemplateError  # transformers renders with it, and imports it as late

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(
            f"problem {problem.uid}: the tokenizer's chat template refuses its messages: {error}"
        ) from error


def _special_spellings(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Matches every special token's text and every placeholder; None when the tokenizer has no special token."""
    texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not texts:
        return None
    texts.sort(key=len, reverse=True)  # the longest first, where one begins with another
    return re.compile("|".join([*map(re.escape, texts), "[\uf8ff\uf8fe]"]))
