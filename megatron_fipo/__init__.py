"""FIPO post-training of reasoning language models on Megatron and SGLang."""
