"""The qwen2 family, under SGLang's own class."""

from sglang.srt.models.qwen2 import EntryClass

__all__ = ["EntryClass"]
