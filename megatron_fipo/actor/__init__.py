"""The Megatron side: the only package, with patches, that imports megatron."""
