"""The qwen3_moe family, under SGLang's own class."""

from sglang.srt.models.qwen3_moe import EntryClass

__all__ = ["EntryClass"]
