"""The SGLang side: the only package, with patches, that imports sglang."""
