"""The qwen3 family, under SGLang's own class."""

from sglang.srt.models.qwen3 import EntryClass

__all__ = ["EntryClass"]
