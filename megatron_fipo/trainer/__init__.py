"""The training loop and its stages; imports neither Megatron nor SGLang."""
