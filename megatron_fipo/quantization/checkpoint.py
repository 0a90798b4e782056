"""From a checkpoint to its quantised one: read, calibrate, measure, write."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.config import require
from megatron_fipo.data import make_sources
from megatron_fipo.data.prompts import PromptEncoder, PromptFormat, fitting_prompt
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.quantization.export import check_absent, write_quantised
from megatron_fipo.quantization.formats import choose_group_size
from megatron_fipo.quantization.quality import compare, continue_greedily, end_tokens, greedy
from megatron_fipo.quantization.request import QuantizationRequest
from megatron_fipo.quantization.simulation import quantise_model, require_modelopt
from megatron_fipo.rewards import GraderPool, reward_name
from megatron_fipo.trainer.evaluation import answer_problems, evaluation_result
from megatron_fipo.types import Prompt, SamplingSettings
from megatron_fipo.weights.architecture import Architecture, hf_shapes, read_architecture
from megatron_fipo.weights.hf_files import HFWeights, check_hf_shapes

TOKENS_PER_BATCH = 2048
Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]
"""(title, total) -> a context whose value is told how many more are done."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Token ids to calibrate on, and the problems of each evaluation data set."""

    calibration: list[list[int]]
    evaluation: dict[str, list[Prompt]]


def quantize_checkpoint(request: QuantizationRequest, progress: Progress) -> list[str]:
    """Do what the command line asks for and return the lines that say what came of it.

    Raises ValueError for whatever the user can act on; nothing is written then.
    """
    source, save_dir = Path(request.hf_checkpoint), Path(request.save)
    check_absent(save_dir)
    arch = read_architecture(source)
    group_size = choose_group_size(arch, request.quant_format, request.group_size)
    device = choose_device(request)
    if request.evaluates:
        reward_name(request.data)
    require_modelopt()
    weights = HFWeights(source)
    check_hf_shapes(arch, weights)
    tokenizer = load_tokenizer(request.hf_checkpoint)
    prompts = read_prompts(request, arch, tokenizer)
    _check_token_ids(prompts, arch, source)
    stored = stored_dtype(arch, weights)

    def load() -> Any:
        return load_model(source, stored, device, bf16=request.bf16)

    before = load()
    batches = calibration_batches(request, before, tokenizer, prompts.calibration, progress)
    accuracy_before = measure_accuracy(request, before, tokenizer, prompts, "before", progress)
    after = load()  # quantisation is in place
    num_passes = 2 if request.quant_format == "int4-awq" else 1
    with progress("calibrating", num_passes * len(batches)) as finished:
        quantise_model(after, request.quant_format, group_size, stored, lambda: _told(batches, finished))
    with progress("comparing", len(batches)) as finished:
        fidelity = compare(before, after, _told(batches, finished))
    del before
    gc.collect()
    accuracy_after = measure_accuracy(request, after, tokenizer, prompts, "after", progress)
    report = {
        "format": request.quant_format,
        "group_size": group_size,
        "num_calibration_samples": len(prompts.calibration),
        "num_calibration_tokens": sum(batch.numel() for batch in batches),
        "calibration_response_len": request.response_len,
        "seed": request.seed,
        "computed_in": "bfloat16" if request.bf16 else "float32",
        **dataclasses.asdict(fidelity),
        "accuracy_before": accuracy_before,
        "accuracy_after": accuracy_after,
        "software": {name: version(name) for name in ("nvidia-modelopt", "torch", "transformers")},
    }
    write_quantised(
        save_dir,
        source,
        after,
        request.quant_format,
        group_size,
        stored,
        report,
        max_shard_bytes=request.max_shard_bytes,
    )
    return report_lines(report, source, save_dir)


def _check_token_ids(prompts: Prompts, arch: Architecture, source: Path) -> None:
    evaluated = [prompt.token_ids.tolist() for problems in prompts.evaluation.values() for prompt in problems]
    largest = max(itertools.chain(*prompts.calibration, *evaluated), default=0)
    known = f"less than config.json's vocab_size {arch.vocab_size}"
    require(largest < arch.vocab_size, f"a token id of the tokenizer in {source}", largest, known)


def stored_dtype(arch: Architecture, weights: HFWeights) -> torch.dtype:
    """Of the tensors that stay as they are: fp16 where the files are, or config.json says so of fp32; else bf16."""
    found = {weights.dtype(name) for name in hf_shapes(arch)}
    is_half = found == {torch.float16} or (arch.dtype == torch.float16 and torch.bfloat16 not in found)
    return torch.float16 if is_half else torch.bfloat16


def choose_device(request: QuantizationRequest) -> torch.device:
    """The device that --device and --format ask for. Raises ValueError when it is not there."""
    has_cuda = torch.cuda.is_available()
    require(request.device != "cuda" or has_cuda, "--device", request.device, "cpu or auto: no CUDA device is visible")
    device = torch.device("cuda" if has_cuda and request.device != "cpu" else "cpu")
    require(
        request.quant_format != "nvfp4" or device.type == "cuda",
        "--format",
        request.quant_format,
        "fp8 or int4-awq on a CPU: modelopt simulates NVFP4 on CUDA tensors only",
    )
    return device


def load_model(directory: Path, stored: torch.dtype, device: torch.device, *, bf16: bool) -> Any:
    """The model with its weights rounded to `stored`, in the precision it is to compute in."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=stored, local_files_only=True, experts_implementation="eager"
    )
    return model.to(device=device, dtype=torch.bfloat16 if bf16 else torch.float32).eval().requires_grad_(False)


def read_prompts(request: QuantizationRequest, arch: Architecture, tokenizer: Any) -> Prompts:
    """All prompts as token ids, long ones dealt with. Raises ValueError when none is left to calibrate on."""
    longest = request.seq_length + max(request.response_len, request.eval_max_response_len * request.evaluates)
    require(
        longest <= arch.max_position_embeddings,
        "--calibration-seq-length and a response",
        longest,
        f"at most the checkpoint's context, {arch.max_position_embeddings} tokens",
    )
    data = request.data
    source, held_out, notes = make_sources(data, request.seed)
    for note in notes:
        print(note, file=sys.stderr)
    encoder = PromptEncoder(tokenizer, PromptFormat(data.apply_chat_template, data.prompt_template, data.system_prompt))
    cut = data.on_long_prompt == "truncate-left"
    problems = getattr(source, "problems", None)
    num_wanted = request.num_samples if problems is None else min(request.num_samples, len(problems))
    calibration = []
    for problem in (source.next_problem() for _ in range(num_wanted)):
        ids = encoder.encode(problem)
        if len(ids) > request.seq_length and data.on_long_prompt == "skip":
            continue
        if len(ids) > request.seq_length and not cut:
            raise ValueError(
                f"problem {problem.uid}: the prompt has {len(ids)} tokens, but --calibration-seq-length allows "
                f"{request.seq_length}; allow more, or give --on-long-prompt skip or truncate-left"
            )
        calibration.append(ids[-request.seq_length :])
    if not calibration:
        raise ValueError(
            f"none of {num_wanted} calibration prompts has at most {request.seq_length} tokens "
            "(--calibration-seq-length)"
        )
    evaluation = {
        name: [fitting_prompt(p, encoder.encode(p), request.seq_length, truncate=cut) for p in members]
        for name, members in held_out.items()
    }
    return Prompts(calibration, evaluation)


def calibration_batches(
    request: QuantizationRequest, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], progress: Progress
) -> list[Tensor]:
    """Token ids [B, L] without padding: prompts of one length, with the model's own answers if those are asked for."""
    texts = [list(prompt) for prompt in prompts]
    if request.response_len:
        ends = end_tokens(model, tokenizer)
        ordered = sorted(texts, key=len)
        texts = []
        with progress("answering for calibration", len(ordered)) as finished:
            for start in range(0, len(ordered), request.eval_batch_size):
                chunk = ordered[start : start + request.eval_batch_size]
                answers = continue_greedily(model, chunk, request.response_len, ends)
                texts += [prompt + answer for prompt, answer in zip(chunk, answers, strict=True)]
                finished(len(chunk))
    batches = []
    for length, members in itertools.groupby(sorted(texts, key=len), key=len):
        rows, num_rows = list(members), max(1, TOKENS_PER_BATCH // length)
        batches += [torch.tensor(rows[i : i + num_rows], device=model.device) for i in range(0, len(rows), num_rows)]
    return batches


def measure_accuracy(
    request: QuantizationRequest, model: Any, tokenizer: Any, prompts: Prompts, when: str, progress: Progress
) -> dict[str, float]:
    """The share of right greedy answers by data set; empty when there is nothing to evaluate on."""
    if not request.evaluates:
        return {}
    data = request.data
    memory_bytes = data.reward_memory_mb * 2**20
    found = {}
    with GraderPool(reward_name(data), timeout_s=data.reward_timeout_s, memory_bytes=memory_bytes) as graders:
        for name, members in prompts.evaluation.items():
            with progress(f"answering {name} {when}", len(members)) as finished:
                problems = answer_problems(
                    members,
                    greedy(model, tokenizer, request.eval_batch_size, finished),
                    tokenizer,
                    graders.grade,
                    sampling=SamplingSettings(request.eval_max_response_len, temperature=0.0),
                    n_samples=1,
                    seed=request.seed,
                    on_reward_error=data.on_reward_error,
                )
            found[name] = evaluation_result(name, problems, request.seed).accuracy
    return found


def report_lines(report: dict[str, Any], source: Path, save_dir: Path) -> list[str]:
    """What the user is told at the end."""
    sizes = [sum(f.stat().st_size for f in path.glob("*.safetensors")) / 2**20 for path in (source, save_dir)]
    group = f", groups of {report['group_size']}" if report["group_size"] else ""
    return [
        f"{report['format']}{group}: {sizes[0]:.0f} MiB of weights became {sizes[1]:.0f} MiB",
        f"calibrated on {report['num_calibration_samples']} prompts, {report['num_calibration_tokens']} tokens, where",
        f"  mean KL {report['kl']:.5f} nats, largest logit difference {report['max_logit_difference']:.3f}, "
        f"likeliest token the same for {report['same_likeliest']:.1%}",
        f"  perplexity {report['perplexity_before']:.3f} before, {report['perplexity_after']:.3f} after",
        *(
            f"accuracy on {name}: {before:.4f} before, {report['accuracy_after'][name]:.4f} after"
            for name, before in report["accuracy_before"].items()
        ),
        f"written: {save_dir}",
    ]


def _told(batches: Sequence[Tensor], finished: Callable[[int], None]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        finished(1)


@contextlib.contextmanager
def shown_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar in a terminal, a line every ten seconds elsewhere."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    done, told = 0, time.monotonic()
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def finished(count: int) -> None:
            nonlocal done, told
            done += count
            bar.update(task, advance=count)
            if not console.is_terminal and time.monotonic() - told > 10:
                told = time.monotonic()
                print(f"{title}: {done}/{total}", file=sys.stderr, flush=True)

        yield finished
