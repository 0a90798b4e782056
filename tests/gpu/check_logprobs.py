"""Log-probs from hidden states: values and gradients beside the eager form, and the memory of a long pack.

What the CPU cannot show: that 131072 tokens of a vocabulary of 152064 take at most 1 GiB beside inputs and gradients.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from checking import add_paths, arguments, require, require_close, run_check

add_paths()
SMALL = {"cuda": (4096, 512, 32768), "cpu": (300, 16, 1000)}  # tokens, hidden size, vocabulary
LARGE = {"cuda": (131072, 512, 152064), "cpu": (2000, 16, 1000)}
GIB = 2**30


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    num_tokens, hidden_size, vocab_size = shape
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, device=device, dtype=dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device=device, dtype=dtype)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator, device=device)
    upstream = torch.randn(num_tokens, generator=generator, device=device)
    return hidden.requires_grad_(), weight.mul_(2 * hidden_size**-0.5).requires_grad_(), labels, upstream


def check(options: argparse.Namespace, device: torch.device) -> str:
    from megatron_fipo.ops.linear_logprobs import linear_logprobs
    from megatron_fipo.ops.logprobs import vocab_parallel_logprobs

    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    for chunked in (True, False):
        hidden, weight, labels, upstream = inputs(SMALL[device.type], torch.float32, device)
        vocab_size = len(weight)
        if chunked:
            logprobs, entropy = linear_logprobs(hidden, weight, labels, vocab_size=vocab_size, chunk_size=128)
        else:
            logprobs, entropy = vocab_parallel_logprobs(F.linear(hidden, weight), labels, vocab_size=vocab_size)
        (logprobs * upstream).sum().backward()
        results.append((logprobs, entropy, hidden.grad, weight.grad))
    names = ("log-probs", "entropies", "gradient by hidden", "gradient by weight")
    worst = max(require_close(*pair, 1e-4, name) for *pair, name in zip(*results, names))
    del results, hidden, weight, logprobs, entropy

    hidden, weight, labels, upstream = inputs(LARGE[device.type], torch.bfloat16, device)
    gradients = hidden.numel() * hidden.element_size() + weight.numel() * weight.element_size()
    if device.type == "cpu":
        logprobs, _ = linear_logprobs(hidden, weight, labels, vocab_size=len(weight), chunk_size=256)
        (logprobs * upstream).sum().backward()
        return f"off by at most {worst:.1e}; memory is measured on CUDA"
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    logprobs, _ = linear_logprobs(hidden, weight, labels, vocab_size=len(weight), chunk_size=1024)
    (logprobs * upstream).sum().backward()
    extra = torch.cuda.max_memory_allocated(device) - before - gradients
    require(bool(torch.isfinite(hidden.grad).all()), "a gradient is not finite")
    require(extra <= GIB, f"{extra / GIB:.2f} GiB beside inputs and gradients, at most 1 is right")
    return f"off by at most {worst:.1e}; {extra / GIB:.2f} GiB at {len(labels)} tokens"


if __name__ == "__main__":
    sys.exit(run_check(check, arguments(__doc__).parse_args()))
