"""Evaluates a checkpoint through SGLang: a Hugging Face one, or a training run's. docs/evaluation.md explains it.

python tools/evaluate.py --hf-checkpoint DIR [--load CHECKPOINTS] --eval-prompt-data NAME=FILE ... --rm-type NAME
    --n-samples-per-eval-prompt 32 --eval-temperature 1 --eval-top-p 0.7 --output-dir OUT

Every finished block of problems is on disk at once: the same command goes on where a killed one stopped.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fipo.config import require
from megatron_fipo.evaluation_arguments import (
    EvaluationRequest,
    evaluation_help_text,
    evaluation_options,
    parse_evaluation,
)
from megatron_fipo.flags.render import sglang_help_text
from megatron_fipo.train import RUN_FAILED, USER_ERROR, Signals

if TYPE_CHECKING:
    import torch

    from megatron_fipo.rollout.pool import EnginePool
    from megatron_fipo.trainer.evaluation_file import Block, ResponseFile
    from megatron_fipo.types import Prompt, SamplingSettings
    from megatron_fipo.weights.architecture import Architecture

EXPORT_DIR = ".exported_weights"


@dataclass(frozen=True, eq=False)
class Model:
    """The weights that are evaluated: where they come from and what stands for them in the settings."""

    arch: Architecture
    checkpoint: Path | None  # of --load
    dtype: str
    digests: dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check, evaluate. What the user can act on, and signals, are one line on stderr and a non-zero status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with Signals() as signals:
        try:
            if {"-h", "--help"} & set(words):
                print(evaluation_help_text())
            elif "--help-sglang" in words:
                print(sglang_help_text(evaluation_options()))
            else:
                evaluate_checkpoint(parse_evaluation(words), signals.ending)
            return 0
        except KeyboardInterrupt:
            signals.ending()
            number = signals.received[0]
            print(f"interrupted by {signal.Signals(number).name}", file=sys.stderr, flush=True)
            return 128 + number
        except ValueError as error:
            return _fail(error, USER_ERROR)
        except OSError as error:
            if error.filename is None:
                raise
            return _fail(error, RUN_FAILED)
        except RuntimeError as error:
            from megatron_fipo.rollout.engine import EngineError

            if not isinstance(error, EngineError):
                raise
            return _fail(error, RUN_FAILED)


def evaluate_checkpoint(request: EvaluationRequest, ending: Callable[[], None]) -> None:
    """Answer what is not answered yet, then score everything. `ending` is called before the clean-up."""
    from megatron_fipo.checks import choose_device
    from megatron_fipo.data.tokenizer import load_tokenizer
    from megatron_fipo.rewards import GraderPool, reward_name
    from megatron_fipo.trainer.evaluation import answer_problems, evaluation_result
    from megatron_fipo.trainer.evaluation_file import ResponseFile, blocks_of
    from megatron_fipo.trainer.evaluation_report import write_results

    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")  # upstream's notes to its own developers
    data, run = request.data, request.run
    device, model = choose_device(request.device), read_model(request)
    tokenizer = load_tokenizer(run.hf_checkpoint)
    data_sets = read_prompts(request, tokenizer)
    blocks = blocks_of(data_sets, request.block_size)
    reward, num_engines = reward_name(data), choose_num_engines(request, device)
    settings = settings_record(request, model, data_sets, reward, device, num_engines)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(ResponseFile(run.output_dir, settings, blocks, data.n_samples_per_eval_prompt))
        _check_kept(request, file)
        left = blocks[len(file.finished) :]
        if left:
            graders = stack.enter_context(
                GraderPool(reward, timeout_s=data.reward_timeout_s, memory_bytes=data.reward_memory_mb * 2**20)
            )
            stack.callback(ending)  # comes first on the way out
            pool = stack.enter_context(open_engines(request, model, device, num_engines))
            stack.callback(ending)
            print(f"starting {num_engines} engine{'s' * (num_engines > 1)}", file=sys.stderr, flush=True)
            pool.wait_ready()
            pool.revive = partial(start_again, pool)  # when none is left
            with progress(file) as finished:
                for block in left:
                    if pool.failed:
                        start_again(pool)
                    problems = answer_problems(
                        block.prompts,
                        pool.generate,
                        tokenizer,
                        graders.grade,
                        sampling=sampling_of(request),
                        n_samples=data.n_samples_per_eval_prompt,
                        seed=run.seed,
                        on_reward_error=data.on_reward_error,
                    )
                    file.append(problems)
                    finished(block)
        results = [evaluation_result(name, file.problems(name), run.seed) for name in data_sets]
    title = f"Evaluation of {model.checkpoint or run.hf_checkpoint}"
    paths = write_results(run.output_dir, title, settings, results)
    for result in results:
        print(result.line())
    print(f"written: {', '.join(str(path) for path in paths)}")


def read_model(request: EvaluationRequest) -> Model:
    """Check the checkpoint as far as possible without loading it; its digests stand for the weights."""
    from megatron_fipo.checks import check_engine_layout
    from megatron_fipo.weights.architecture import read_architecture
    from megatron_fipo.weights.hf_files import HFWeights, carried_files, check_hf_shapes

    directory = request.run.hf_checkpoint
    arch = read_architecture(directory)
    longest = request.max_prompt_len + request.max_response_len
    require(
        longest <= arch.max_position_embeddings,
        "--rollout-max-prompt-len + --eval-max-response-len",
        longest,
        f"at most the checkpoint's context, {arch.max_position_embeddings} tokens ({directory}/config.json)",
    )
    check_engine_layout(request.engine, arch)
    files = [Path(directory) / name for name in carried_files(directory)]
    checkpoint, stored = None, str(arch.dtype)
    if request.run.load is None:
        check_hf_shapes(arch, HFWeights(directory))
        files += sorted(Path(directory).glob("*.safetensors"))
    else:
        from megatron_fipo.actor.checkpoint_files import MANIFEST, find_checkpoint, saved_dtype, verify_checkpoint

        checkpoint = find_checkpoint(request.run.load)
        verify_checkpoint(checkpoint)
        stored = str(saved_dtype(checkpoint))
        files.append(checkpoint / MANIFEST)  # which holds the digests of everything else
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as threads:
        digests = dict(zip([f"{file.name} (SHA-256)" for file in files], threads.map(_digest, files)))
    is_bf16 = request.bf16 or stored.removeprefix("torch.") == "bfloat16"
    return Model(arch, checkpoint, "bfloat16" if is_bf16 else "float32", digests)


def read_prompts(request: EvaluationRequest, tokenizer: Any) -> dict[str, list[Prompt]]:
    """The tokenized problems of every data set; says what the user should know about them."""
    from megatron_fipo.data import make_sources, read_evaluation
    from megatron_fipo.data.files import FileFormat
    from megatron_fipo.data.prompts import PromptEncoder, PromptFormat, fitting_prompt

    data = request.data
    if data.task is not None:
        _, problems, notes = make_sources(data, request.run.seed)
    else:
        file_format = FileFormat(data.input_key, data.label_key, data.deduplicate, data.dedup_key)
        problems, notes = read_evaluation(data.eval_prompt_data, file_format)
    encoder = PromptEncoder(tokenizer, PromptFormat(data.apply_chat_template, data.prompt_template, data.system_prompt))
    cut = data.on_long_prompt == "truncate-left"
    prompts, num_cut = {}, 0
    for name, members in problems.items():
        encoded = [(problem, encoder.encode(problem)) for problem in members]
        num_cut += sum(len(ids) > request.max_prompt_len for _, ids in encoded)
        prompts[name] = [fitting_prompt(problem, ids, request.max_prompt_len, truncate=cut) for problem, ids in encoded]
    truncated = (f"{num_cut} prompts are cut to their last {request.max_prompt_len} tokens",) if num_cut else ()
    for note in (*request.notes, *notes, *truncated):
        print(note, file=sys.stderr, flush=True)
    return prompts


def settings_record(
    request: EvaluationRequest,
    model: Model,
    data_sets: Mapping[str, Sequence[Prompt]],
    reward: str,
    device: torch.device,
    num_engines: int,
) -> dict[str, Any]:
    """All that the responses and their verdicts depend on, by the names that the user knows."""
    data = request.data
    return {
        **model.digests,
        **{f"prompts of {name} (SHA-256)": _digest_of_prompts(prompts) for name, prompts in data_sets.items()},
        "reward": reward,
        "--n-samples-per-eval-prompt": data.n_samples_per_eval_prompt,
        "--eval-temperature": data.eval_temperature,
        "--eval-top-p": data.eval_top_p,
        "--eval-top-k": data.eval_top_k,
        "--eval-max-response-len": request.max_response_len,
        "--rollout-max-prompt-len": request.max_prompt_len,
        "--seed": request.run.seed,
        "--eval-block-size": request.block_size,
        "--rollout-num-engines": num_engines,
        "--rollout-num-gpus-per-engine": request.engine.tp_size,
        **{f"--sglang-{name.replace('_', '-')}": value for name, value in sorted(request.engine.server_args.items())},
        "precision": model.dtype,
        "device": device.type,
        "software": f"sglang {version('sglang')}, torch {version('torch')}",
    }


def sampling_of(request: EvaluationRequest) -> SamplingSettings:
    """How responses are drawn."""
    from megatron_fipo.types import SamplingSettings

    data = request.data
    return SamplingSettings(request.max_response_len, data.eval_temperature, data.eval_top_p, data.eval_top_k)


def choose_num_engines(request: EvaluationRequest, device: torch.device) -> int:
    """As many as asked for, or as fit on the GPUs; one on the CPU."""
    import torch

    num_devices = torch.cuda.device_count() if device.type == "cuda" else 1
    return request.engine.num_engines or max(1, num_devices // request.engine.tp_size)


@contextlib.contextmanager
def open_engines(
    request: EvaluationRequest, model: Model, device: torch.device, num_engines: int
) -> Iterator[EnginePool]:
    """Engines that start; `wait_ready` waits for them. Weights of --load are exported first, and removed at the end."""
    from megatron_fipo.rollout.server_process import start_engines

    run, engine = request.run, request.engine
    with contextlib.ExitStack() as stack:
        weights = run.hf_checkpoint
        if model.checkpoint is not None:
            weights = str(Path(run.output_dir) / EXPORT_DIR)
            stack.callback(_remove_export, Path(weights))
            _remove_export(Path(weights))
            _export(request, model, device, weights)
        engines = start_engines(
            weights,
            engine,
            num_engines=num_engines,
            dtype="bfloat16" if model.dtype == "bfloat16" else "float32",
            longest=request.max_prompt_len + request.max_response_len,
            random_seed=run.seed,
            log_dir=run.output_dir,
            use_cpu=device.type == "cpu",
        )
        yield stack.enter_context(engines)


def start_again(pool: EnginePool) -> None:
    """Start failed engines again, as often as --rollout-max-restarts allows: they load from disk what all serve."""
    pool.restart_failed()
    pool.await_restarted()
    for engine in pool.engines:
        if engine.name not in pool.failed:
            engine.weight_version = pool.weight_version
    pool.adopt_update(pool.weight_version, pool.failed, {})


@contextlib.contextmanager
def progress(file: ResponseFile) -> Iterator[Callable[[Block], None]]:
    """Shows how far it is: a bar in a terminal, a line per block elsewhere. What is yielded is told of each block."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    total = sum(len(block.prompts) for block in file.blocks)
    before = sum(len(problems) for problems in file.finished)
    console = Console(stderr=True)
    if before:
        console.print(f"{before} of {total} problems are answered already", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("problems"))
    bar = Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    start = time.monotonic()
    with bar:
        task = bar.add_task("answering", total=total, completed=before)

        def finished(block: Block) -> None:
            problems = file.problems(block.data_set)
            responses = [response for problem in problems for response in problem.responses]
            accuracy = sum(response.accuracy for response in responses) / len(responses)
            done = sum(len(problems) for problems in file.finished)
            text = f"{block.data_set}: accuracy so far {accuracy:.3f}"
            bar.update(task, description=text, completed=done)
            if not console.is_terminal:
                left = (time.monotonic() - start) / (done - before) * (total - done)
                line = f"{done}/{total} problems, {text}, {left:.0f} s left"
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield finished


def _export(request: EvaluationRequest, model: Model, device: torch.device, save_dir: str) -> None:
    import torch

    if device.type == "cpu":
        from megatron_fipo.patches.megatron_cpu import apply_patches

        apply_patches()
    from megatron_fipo.actor.export import export_checkpoint

    assert model.checkpoint is not None
    export_checkpoint(
        model.checkpoint,
        save_dir,
        hf_checkpoint=request.run.hf_checkpoint,
        arch=model.arch,
        device=device,
        transformer_impl=request.transformer_impl or ("transformer_engine" if device.type == "cuda" else "local"),
    )
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engines need it


def _check_kept(request: EvaluationRequest, file: ResponseFile) -> None:
    """Verdicts that failed are not taken over where that is an error."""
    errors = [r.error for problems in file.finished for p in problems for r in p.responses if r.error is not None]
    if errors and request.data.on_reward_error == "fail":
        raise ValueError(
            f"--output-dir {request.run.output_dir} holds {len(errors)} responses without a verdict, the first: "
            f"{errors[0]}; take them over with --on-reward-error drop, or give another directory"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        problem = prompt.problem
        told = json.dumps(problem.extra, sort_keys=True)  # to the reward, beside the ground truth
        digest.update(repr((problem.uid, prompt.token_ids.tolist(), problem.ground_truth, told)).encode())
    return digest.hexdigest()


def _remove_export(directory: Path) -> None:
    """The exported weights, and what a killed export left beside them."""
    for found in (directory, *directory.parent.glob(f".{directory.name}.*.partial")):
        if found.is_dir():
            shutil.rmtree(found)


def _fail(error: Exception, status: int) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
