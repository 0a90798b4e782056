"""The tokenizer of a Hugging Face checkpoint directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(directory: str) -> Any:
    """Raises ValueError naming --hf-checkpoint when the directory holds no tokenizer, or one that cannot be loaded."""
    if not any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(
            f"--hf-checkpoint is {directory!r}, which holds no tokenizer: tokenizer.json, tokenizer.model or "
            "vocab.json is wanted"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"the tokenizer in --hf-checkpoint {directory!r} cannot be loaded: {reason[0]}") from error
