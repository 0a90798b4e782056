"""Keep the tied embedding on the CPU when the pipeline has more than one stage.

Why: the last stage's copy of the word embedding is moved with `.cuda()` before it is all-reduced.
Upstream: megatron.core.models.common.language_module.LanguageModule.setup_embeddings_and_output_layer.
Drop-when: the move names the model's own device.
Test: tests/distributed/test_patch_megatron.py::test_embedding_stays_on_cpu_is_needed
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule

REPLACES: Final = {
    "megatron.core.models.common.language_module.language_module:"
    "LanguageModule.setup_embeddings_and_output_layer": "21f4b5c3bd053bf7",
}


def apply() -> None:
    """Wrap the method: while it runs, `Tensor.cuda()` returns the tensor itself."""
    original = LanguageModule.setup_embeddings_and_output_layer

    @functools.wraps(original)
    def setup(self: Any) -> None:
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign,assignment,misc]
        try:
            original(self)
        finally:
            del torch.Tensor.cuda

    LanguageModule.setup_embeddings_and_output_layer = setup
