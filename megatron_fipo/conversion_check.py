"""What both converters' command lines share: the dtype, and the comparison of the two models."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

DTYPES_BY_FLAG: dict[str | None, torch.dtype | None] = {
    None: None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
DIFFERENT_MODELS = 3
"""The exit status of a check that fails."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """--dtype, --check and what belongs to it."""
    parser.add_argument(
        "--dtype",
        choices=[name for name in DTYPES_BY_FLAG if name],
        help="of the result (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="afterwards run both models in fp32 on the CPU (4 bytes of memory per parameter) and compare their logits",
    )
    parser.add_argument("--check-text", metavar="FILE", help="the text for it, UTF-8 (default: a paragraph)")
    parser.add_argument(
        "--check-tolerance",
        type=float,
        default=1e-3,
        metavar="X",
        help=f"largest difference of a logit; beyond it the exit status is {DIFFERENT_MODELS} (default: %(default)s)",
    )


def check(options: argparse.Namespace, hf_dir: str | Path, checkpoint: Path) -> int:
    """Compare the model in `hf_dir` with the one in the torch_dist directory `checkpoint`; the exit status.

    Raises ValueError naming a text or a tokenizer that cannot be read.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")  # upstream's notes to its own developers
    from megatron_fipo.patches.megatron_cpu import apply_patches

    apply_patches()
    from megatron_fipo.actor.logit_check import TEXT, compare_logits

    delta = compare_logits(hf_dir, checkpoint, _text(options.check_text) if options.check_text else TEXT)
    is_same = delta.max_abs_delta <= options.check_tolerance
    print(
        f"check on {delta.num_tokens} tokens in fp32: max |delta logit| {delta.max_abs_delta:.3g}, "
        f"max KL of a token {delta.max_kl:.3g} nats: {'the same model' if is_same else 'NOT the same model'} "
        f"(tolerance {options.check_tolerance:g})"
    )
    return 0 if is_same else DIFFERENT_MODELS


def _text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--check-text {path} cannot be read: {error}") from None
    if not text.strip():
        raise ValueError(f"--check-text {path} is empty, but must hold a text")
    return text
