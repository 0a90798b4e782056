"""Text that spells a control token stays text, through any chat template and with the tokenizer's own rules.

While templates run, each spelling in a problem's text is a placeholder. Afterwards the control tokens that are still
spelled came from the template. A copy of the tokenizer, in which these tokens are spelled in characters that the text
does not hold, then reads the whole: the template's tokens in that spelling, the problem's as mere text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

# Added tokens that are not declared special are control tokens when spelled like these: <think>, <tool_call>,
# <|fim_prefix|>, [INST]. Others are pieces of ordinary text, such as runs of spaces.
MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
PRIVATE_USE = range(0xF0000, 0xFFFFE)  # a plane of characters that no text has reason to hold and no template trims


class ControlTokens:
    """The control tokens of one Hugging Face tokenizer, and encoding that tells them from their spelling."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._id_of = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.content and (token.special or MARKUP.fullmatch(token.content))
        }
        longest_first = sorted(self._id_of, key=len, reverse=True)  # as the tokenizer, where one begins with another
        self._spellings = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        unknown = self._id_of.get(str(tokenizer.unk_token)) if hasattr(tokenizer, "unk_token") else None
        self._ids = frozenset(self._id_of.values()) - {unknown}  # the unknown token stands for text, too
        self._latest_copy: tuple[str, Any] = ("", None)

    def hidden(self, texts: Iterable[str]) -> Hidden:
        """Hides spellings in `texts`, which are all that one problem says."""
        joined = "".join(texts)
        marker = next((chr(i) for i in PRIVATE_USE if chr(i) not in joined), None)
        if marker is None:
            raise ValueError("a prompt holds every character of the private use plane U+F0000 to U+FFFFD")
        return Hidden(marker, self._spellings)

    def count(self, text: str) -> int:
        """How many control tokens are spelled in `text`."""
        return len(self._spellings.findall(text)) if self._spellings is not None else 0

    def encode(self, text: str, hidden: Hidden, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a rendered text in which `hidden` hid spellings.

        Raises ValueError when the template tore a placeholder, and when a spelling is hidden but the tokenizer is not
        one of the library tokenizers, which alone can be copied.
        """
        expected = self.count(text)
        if not hidden.spellings:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            found = sum(i in self._ids for i in ids)
            if found == expected + self._num_added(add_special_tokens):
                return ids
            # The tokenizer found more: its normalisation made a control token of what is spelled otherwise.
        rename = hidden.renamed(self._id_of)
        if self._spellings is not None:
            text = self._spellings.sub(lambda match: rename[match.group()], text)
        return list(
            self._copy(hidden.marker, rename).encode(hidden.reveal(text), add_special_tokens=add_special_tokens).ids
        )

    def _num_added(self, add_special_tokens: bool) -> int:
        return len(self._tokenizer.encode("", add_special_tokens=True)) if add_special_tokens else 0

    def _copy(self, marker: str, rename: dict[str, str]) -> Any:
        """The tokenizer with its control tokens spelled as `rename` says, which holds `marker`."""
        if marker == self._latest_copy[0]:
            return self._latest_copy[1]
        from tokenizers import Tokenizer as FastTokenizer

        backend = self._tokenizer.backend_tokenizer if hasattr(self._tokenizer, "backend_tokenizer") else None
        if not isinstance(backend, FastTokenizer):
            raise ValueError(
                "a prompt spells a control token, and this tokenizer cannot be told to take it as text: it has no "
                "tokenizer.json; leave the prompt out, or convert the tokenizer"
            )
        parts = json.loads(backend.to_str())
        parts["truncation"] = parts["padding"] = None
        for token in parts["added_tokens"]:
            if token["content"] in rename:
                token["content"], token["normalized"] = rename[token["content"]], False
        model = parts["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {rename.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:
            model["vocab"] = [[rename.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in rename:
            model["unk_token"] = rename[model["unk_token"]]
        copy = FastTokenizer.from_str(json.dumps(parts))
        for spelling, token_id in self._id_of.items():
            found = copy.token_to_id(rename[spelling])
            assert found == token_id, (spelling, found, token_id)
        self._latest_copy = marker, copy
        return copy


class Hidden:
    """The spellings hidden in one problem's texts, each behind `marker`, its number and `marker`."""

    def __init__(self, marker: str, pattern: re.Pattern[str] | None) -> None:
        self.marker = marker
        self.spellings: list[str] = []
        self._pattern = pattern

    def hide(self, text: str) -> str:
        """`text` with a placeholder for every control token it spells."""
        if self._pattern is None:
            return text

        def placeholder(match: re.Match[str]) -> str:
            self.spellings.append(match.group())
            return f"{self.marker}{len(self.spellings) - 1}{self.marker}"

        return self._pattern.sub(placeholder, text)

    def cover(self, text: str) -> str:
        """A placeholder for all of `text`, unless it is blank; for finding out what a template itself writes."""
        return f"{self.marker}{self.marker}" if text.strip() else text

    def renamed(self, id_of: dict[str, int]) -> dict[str, str]:
        """A spelling for every control token that no text of this problem holds, nor a placeholder."""
        return {spelling: f"{self.marker}id {i}{self.marker}" for spelling, i in id_of.items()}

    def reveal(self, text: str) -> str:
        """`text` with the hidden spellings back in their places. Raises ValueError when a placeholder is torn."""
        pieces: Sequence[str] = re.split(f"{self.marker}(id )?([0-9]+){self.marker}", text)
        shown: list[str] = []
        for i in range(0, len(pieces) - 1, 3):
            plain, renamed, number = pieces[i : i + 3]
            shown += [plain, f"{self.marker}id {number}{self.marker}" if renamed else self.spellings[int(number)]]
        shown.append(pieces[-1])
        if any(self.marker in plain for plain in pieces[::3]):
            raise ValueError(f"the chat template changes what a prompt says: it tore a placeholder in {text[:200]!r}")
        return "".join(shown)
