"""The model classes an engine may serve, for SGLANG_EXTERNAL_MODEL_PACKAGE: one module per family.

Why: SGLang imports all of its 250 model files to find one class, which is the longest part of an engine's start.
Upstream: sglang.srt.models.registry, environment variable SGLANG_EXTERNAL_MODEL_PACKAGE (any other architecture still
    loads the whole registry)
Drop-when: the registry is lazy.
Test: tests/distributed/test_patch_sglang.py
"""
