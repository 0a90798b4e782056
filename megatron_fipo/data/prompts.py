"""From a problem to the token ids an engine is given: templates, response prefix, length check.

What a problem says is text: a control token spelled in it is not that token (data/literal.py). What the user writes in
--prompt-template and --system-prompt, like the chat template, may spell control tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_fipo.data.literal import ControlTokens, Hidden
from megatron_fipo.types import Problem, Prompt


class Tokenizer(Protocol):
    """What this project asks of a Hugging Face tokenizer."""

    chat_template: Any
    bos_token: str | None

    def encode(self, text: str, **options: Any) -> list[int]:
        """Token ids; option used: add_special_tokens."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """Text; option used: skip_special_tokens."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
        """The rendered conversation; options used: tokenize=False, add_generation_prompt=True."""

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Added tokens by id, each with `content` and `special`."""


class PromptTooLong(ValueError):
    """A prompt of more tokens than --rollout-max-prompt-len."""


@dataclass(frozen=True)
class PromptFormat:
    """What stands around a problem's text: DataSettings' fields of the same names."""

    apply_chat_template: bool = False
    prompt_template: str | None = None
    system_prompt: str | None = None


class PromptEncoder:
    """Makes token ids of problems; keeps what has to be found out about the tokenizer once."""

    def __init__(self, tokenizer: Tokenizer, prompt_format: PromptFormat) -> None:
        self.tokenizer = tokenizer
        self.format = prompt_format
        self._control = ControlTokens(tokenizer)

    def encode(self, problem: Problem) -> list[int]:
        """All token ids of the prompt, then `response_prefix` as the beginning of the assistant's turn.

        Chat messages always go through the tokenizer's chat template, a text only with `apply_chat_template` (as the
        user's message); `system_prompt` is the message before them. `prompt_template` stands around a text, in either
        case. To a text without chat template the tokenizer adds its begin-of-sequence token, unless the template
        around it begins with that.

        Raises ValueError when the tokenizer has no chat template or the template refuses the messages, for an empty
        prompt, and for a template or system prompt that has no place around this prompt.
        """
        if not problem.prompt:
            raise ValueError(f"problem {problem.uid}: the prompt is empty")
        hidden = self._control.hidden(_said(problem))
        if isinstance(problem.prompt, str) and not self.format.apply_chat_template:
            ids = self._encode_text(problem, problem.prompt, hidden)
        else:
            ids = self._encode_chat(problem, hidden)
        if problem.response_prefix:
            prefix = self._control.hidden([problem.response_prefix])
            ids = ids + self._control.encode(prefix.hide(problem.response_prefix), prefix, add_special_tokens=False)
        if not ids:
            raise ValueError(f"problem {problem.uid}: the tokenizer makes no token of its prompt {problem.prompt!r}")
        return ids

    def _encode_text(self, problem: Problem, prompt: str, hidden: Hidden) -> list[int]:
        if self.format.system_prompt is not None:
            raise ValueError(
                f"--system-prompt is {self.format.system_prompt!r}, but problem {problem.uid} is a text that goes "
                "through no chat template; add --apply-chat-template, or use --prompt-template"
            )
        text = self._in_template(hidden.hide(prompt))
        begins_itself = bool(self.tokenizer.bos_token) and text.startswith(str(self.tokenizer.bos_token))
        return self._control.encode(text, hidden, add_special_tokens=not begins_itself)

    def _encode_chat(self, problem: Problem, hidden: Hidden) -> list[int]:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"problem {problem.uid}: its prompt is for a chat template (messages, or --apply-chat-template), but "
                "the tokenizer in --hf-checkpoint has none"
            )
        text = _render(problem, self.tokenizer, self._messages(problem, hidden.hide))
        outline = _render(problem, self.tokenizer, self._messages(problem, hidden.cover))
        if self._control.count(text) != self._control.count(outline):
            raise ValueError(
                f"problem {problem.uid}: the tokenizer's chat template makes a control token of what a message says: "
                f"{text[:200]!r}"
            )
        return self._control.encode(text, hidden, add_special_tokens=False)

    def _messages(self, problem: Problem, hide: Callable[[str], str]) -> list[dict[str, str]]:
        """The chat messages, with `hide` applied to what the problem says in them."""
        system_prompt, template = self.format.system_prompt, self.format.prompt_template
        if isinstance(problem.prompt, str):
            messages = [{"role": "user", "content": self._in_template(hide(problem.prompt))}]
        elif template is not None:
            raise ValueError(
                f"--prompt-template is {template!r}, but the prompt of problem {problem.uid} is a list of chat "
                "messages; it stands around texts only"
            )
        else:
            messages = [{"role": m["role"], "content": hide(m["content"])} for m in problem.prompt]
        if system_prompt is None:
            return messages
        if messages[0]["role"] == "system":
            raise ValueError(
                f"--system-prompt is {system_prompt!r}, but problem {problem.uid} begins with a system message of its "
                "own"
            )
        return [{"role": "system", "content": system_prompt}, *messages]

    def _in_template(self, text: str) -> str:
        template = self.format.prompt_template
        return text if template is None else template.replace("{prompt}", text)


def tokenize_problem(
    problem: Problem,
    tokenizer: Tokenizer,
    *,
    apply_chat_template: bool,
    max_prompt_len: int,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
) -> Prompt:
    """One problem as token ids, by `PromptEncoder.encode`.

    Raises ValueError as that does, and PromptTooLong for more than `max_prompt_len` tokens (--rollout-max-prompt-len).
    """
    encoder = PromptEncoder(tokenizer, PromptFormat(apply_chat_template, prompt_template, system_prompt))
    return fitting_prompt(problem, encoder.encode(problem), max_prompt_len)


def fitting_prompt(problem: Problem, ids: Sequence[int], max_prompt_len: int, *, truncate: bool = False) -> Prompt:
    """The prompt, cut down to its last `max_prompt_len` tokens with `truncate`. Raises PromptTooLong without."""
    if len(ids) > max_prompt_len and not truncate:
        raise PromptTooLong(
            f"problem {problem.uid}: the prompt has {len(ids)} tokens, but --rollout-max-prompt-len allows "
            f"{max_prompt_len}"
        )
    return Prompt(problem, np.asarray(ids[-max_prompt_len:], dtype=np.int64))


def _said(problem: Problem) -> list[str]:
    """Every text of the problem that a template may show."""
    return [problem.prompt] if isinstance(problem.prompt, str) else [m["content"] for m in problem.prompt]


def _render(problem: Problem, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    from jinja2 import TemplateError  # transformers renders with it, and imports it as late

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(
            f"problem {problem.uid}: the tokenizer's chat template refuses its messages: {error}"
        ) from error
