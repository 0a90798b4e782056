"""What both converters' command lines share: the dtype, and the comparison of the two models."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import MutableMapping
from pathlib import Path

import torch

from megatron_fipo.config import require
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.weights.architecture import read_architecture

DTYPES_BY_FLAG: dict[str | None, torch.dtype | None] = {
    None: None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
MAX_TOKENS = 512
TEXT = (
    "A lighthouse keeper counts ships for a living. On Monday she sees 17 of them, on Tuesday twice as many, and on "
    "Wednesday a storm keeps all but 5 in the harbour. How many has she seen by Thursday morning? Let us add them up: "
    "17 + 34 = 51, and 51 + 5 = 56. So the answer is 56. Der Leuchtturmwärter schreibt es in sein Buch; "
    "def total(ships): return sum(ships)  # 56\n今天有五十六艘船。"
)
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


def prepare_check(options: argparse.Namespace, hf_dir: str | Path) -> list[int] | None:
    """What can be wrong with --check, found before anything is written: the token ids to run both models on, or None
    without --check. From here on this process sees no GPU: the check runs on the CPU, wherever it runs.

    Raises ValueError naming a text or a tokenizer that cannot be read or does not belong to the model.
    """
    if not options.check:
        return None
    require(options.check_tolerance >= 0, "--check-tolerance", options.check_tolerance, ">= 0")
    text = _text(options.check_text) if options.check_text else TEXT
    arch = read_architecture(hf_dir)
    token_ids = load_tokenizer(str(hf_dir)).encode(text)[: min(MAX_TOKENS, arch.max_position_embeddings)]
    if not token_ids:
        raise ValueError(f"--check has nothing to compare: the tokenizer in {hf_dir} makes no token of the text")
    known = f"less than config.json's vocab_size {arch.vocab_size}"
    require(
        max(token_ids) < arch.vocab_size, f"--check: a token id of the tokenizer in {hf_dir}", max(token_ids), known
    )
    _patch_for_cpu(os.environ)
    return list(token_ids)


def check(options: argparse.Namespace, hf_dir: str | Path, checkpoint: Path, token_ids: list[int]) -> int:
    """Compare the model in `hf_dir` with the one in the torch_dist directory `checkpoint`; the exit status."""
    from megatron_fipo.actor.logit_check import compare_logits

    delta = compare_logits(hf_dir, checkpoint, token_ids)
    is_same = delta.max_abs_delta <= options.check_tolerance
    print(
        f"check on {delta.num_tokens} tokens in fp32: max |delta logit| {delta.max_abs_delta:.3g}, "
        f"max KL of a token {delta.max_kl:.3g} nats: {'the same model' if is_same else 'NOT the same model'} "
        f"(tolerance {options.check_tolerance:g})"
    )
    return 0 if is_same else DIFFERENT_MODELS


def _patch_for_cpu(environment: MutableMapping[str, str]) -> None:
    environment["CUDA_VISIBLE_DEVICES"] = ""
    if torch.cuda.is_available():
        raise ValueError(
            "--check runs on the CPU, but CUDA is in use already: set CUDA_VISIBLE_DEVICES= for this command"
        )
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")  # upstream's notes to its own developers
    from megatron_fipo.patches.megatron_cpu import apply_patches

    try:
        apply_patches()
    except RuntimeError as error:
        raise ValueError(f"--check cannot run here: {error}") from error


def _text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--check-text {path} cannot be read: {error}") from None
    if not text.strip():
        raise ValueError(f"--check-text {path} is empty, but must hold a text")
    return text
