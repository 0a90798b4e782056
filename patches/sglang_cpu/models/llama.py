"""The llama family, under SGLang's own class."""

from sglang.srt.models.llama import EntryClass

__all__ = ["EntryClass"]
