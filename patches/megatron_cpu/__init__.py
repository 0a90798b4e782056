"""megatron-core on a machine without an accelerator."""
