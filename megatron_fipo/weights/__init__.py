"""Hugging Face checkpoints and their mapping to Megatron's shards."""
