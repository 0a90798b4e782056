"""tools/quantize.py from the command line: a whole run, and every way it refuses one before anything is written."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import run
from safetensors.torch import load_file
from tiny_models import make_model
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_fipo.quantization.checkpoint import stored_dtype
from megatron_fipo.weights.architecture import read_architecture
from megatron_fipo.weights.hf_files import HFWeights

QUESTIONS = [f"{a} + {b} is" for a in range(3, 15, 2) for b in range(2, 4)]
NUM_EVALUATED = 6
RESPONSE_LEN = 5


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama that reads bytes."""
    directory = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>").save_pretrained(directory)
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = make_model("llama", tied=False, eos_token_id=256, **sizes)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def files(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prompts to calibrate on, and problems of which every other one's label is the model's own greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    rows = [{"prompt": text, "label": str(i)} for i, text in enumerate(QUESTIONS)]
    for row in rows[:NUM_EVALUATED:2]:
        ids = tokenizer.encode(row["prompt"], return_tensors="pt")
        answer = model.generate(ids, do_sample=False, max_new_tokens=RESPONSE_LEN, pad_token_id=256)[0, ids.shape[1] :]
        row["label"] = tokenizer.decode(answer, skip_special_tokens=True)
    root = tmp_path_factory.mktemp("data")
    found = {}
    for name, members in {"eval": rows[:NUM_EVALUATED], "calibration": rows[NUM_EVALUATED:], "none": []}.items():
        found[name] = root / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in members))
    return found


def words(model_dir: Path, files: dict[str, Path], save: Path, **changes: Any) -> list[str]:
    """The flags of a run on the tiny model, with `changes`; one that is None is left out."""
    flags: dict[str, Any] = {
        "hf_checkpoint": model_dir,
        "save": changes.pop("save_dir", save),
        "format": "fp8",
        "calibration_data": files["calibration"],
        "calibration_seq_length": 64,
        "device": "cpu",
        "eval_max_response_len": RESPONSE_LEN,
    }
    flags |= changes
    return [
        word
        for name, value in flags.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]


@pytest.mark.parametrize("quant_format", ["fp8", "int4-awq"])
def test_a_run_measures_both_models_and_writes_a_checkpoint_with_its_report(
    quant_format: str,
    model_dir: Path,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save = tmp_path / "new" / "quantised"
    evaluation = {"eval_prompt_data": f"held={files['eval']}", "rm_type": "exact", "eval_batch_size": 4}
    arguments = words(model_dir, files, save, format=quant_format, calibration_response_len=3, **evaluation)
    assert run("quantize", *arguments) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    report = json.loads((save / "quantization_report.json").read_text())
    assert report["accuracy_before"] == {"held": 0.5}  # what the unpadded prompts gave one by one
    assert report["group_size"] == (64 if quant_format == "int4-awq" else None)
    assert report["num_calibration_samples"] == len(QUESTIONS) - NUM_EVALUATED
    assert report["num_calibration_tokens"] > sum(map(len, QUESTIONS[NUM_EVALUATED:])) + 3
    assert 0 < report["kl"] < 0.5
    assert 0.01 < report["max_logit_difference"] < 5
    assert 0.5 < report["same_likeliest"] <= 1
    assert report["perplexity_after"] == pytest.approx(report["perplexity_before"], rel=0.5)
    assert report["perplexity_after"] != report["perplexity_before"]
    assert f"accuracy on held: 0.5000 before, {report['accuracy_after']['held']:.4f} after" in told
    config = json.loads((save / "config.json").read_text())
    original = json.loads((model_dir / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == {"fp8": "modelopt", "int4-awq": "awq"}[quant_format]
    assert config == original
    assert (save / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()
    assert (save / "hf_quant_config.json").is_file() == (quant_format == "fp8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    assert [path.name for path in save.parent.iterdir()] == ["quantised"]
    assert "model.layers.1.mlp.down_proj.weight_scale" in HFWeights(save).names or quant_format == "int4-awq"
    assert run("quantize", *words(save, files, tmp_path / "again")) == 2
    assert "quantization_config" in capsys.readouterr().err


@pytest.mark.parametrize("quant_format", ["fp8", "int4-awq"])
def test_computing_in_bf16_writes_nearly_the_same_weights(
    quant_format: str, model_dir: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    for name, bf16 in (("fp32", None), ("bf16", True)):
        assert run("quantize", *words(model_dir, files, tmp_path / name, format=quant_format, bf16=bf16)) == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "bf16")]
    for name, tensor in weights[0].items():
        if name.endswith(("qweight", "_proj.weight")):
            codes = [each[name].view(torch.uint8) for each in weights]
            assert (codes[0] == codes[1]).float().mean() > (0.6 if quant_format == "int4-awq" else 0.99), name
            assert tensor.dtype == weights[1][name].dtype


def test_the_same_run_writes_the_same_bytes(model_dir: Path, files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run("quantize", *words(model_dir, files, tmp_path / name, format="int4-awq", seed=5)) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "fp4"}, "argument --format: invalid choice: 'fp4'"),
        ({"calibration_data": None}, "--calibration-data FILE or by --task NAME"),
        ({"task": "small_arithmetic"}, "--calibration-data FILE or by --task NAME"),
        (
            {"task": "small_arithmetic", "calibration_data": None, "task_args": "[1]"},
            "--task-args is '[1]', but must be a",
        ),
        ({"calibration_data": "none"}, "none.jsonl', which holds no problem"),
        ({"calibration_data": "nowhere.jsonl"}, "--calibration-data is 'nowhere.jsonl', but no such file exists"),
        ({"num_calibration_samples": 0}, "--num-calibration-samples is 0, but must be >= 1"),
        ({"calibration_seq_length": 5}, "tokens, but --calibration-seq-length allows 5"),
        ({"calibration_seq_length": 5, "on_long_prompt": "skip"}, "none of 6 calibration prompts has at most 5 tokens"),
        ({"calibration_seq_length": 300}, "at most the checkpoint's context, 256 tokens"),
        ({"rm_type": "exact"}, "--rm-type is 'exact', but must be left out without --eval-prompt-data"),
        ({"eval_prompt_data": "eval"}, "prompts of a file need a reward: --rm-type"),
        ({"eval_prompt_data": "calibration", "rm_type": "exact"}, "must share no prompt"),
        ({"apply_chat_template": True}, "has none"),
        ({"group_size": 32}, "--group-size is 32, but must be left out: it is for --format int4-awq"),
        ({"format": "int4-awq", "group_size": 48}, "--group-size is 48, but must be one of [64, 32]"),
        ({"format": "nvfp4"}, "--format is 'nvfp4', but must be fp8 or int4-awq on a CPU"),
        ({"save_dir": ""}, "--save is '' or the working directory, but must be a directory of its own"),
        (
            {"save_dir": "/dev/null/out"},
            "--save is '/dev/null/out', but '/dev/null' is no directory that can be written",
        ),
        ({"hf_checkpoint": "nowhere"}, "nowhere/config.json cannot be read"),
        ({"tpyo": 1}, "unrecognized arguments: --tpyo 1"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_and_writes_nothing(
    changes: dict[str, Any],
    message: str,
    model_dir: Path,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = {name: files.get(value, value) if name.endswith("data") else value for name, value in changes.items()}
    assert run("quantize", *words(model_dir, files, tmp_path / "out", **changed)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "fields", "quant_format", "message"),
    [
        ("llama", {"hidden_size": 72, "num_attention_heads": 4, "head_dim": 16}, "int4-awq", "no group size of"),
        ("llama", {"hidden_size": 72, "num_attention_heads": 4, "head_dim": 16}, "fp8", "72 hidden channels"),
        ("qwen3_moe", {"hidden_size": 64, "head_dim": 16}, "int4-awq", "fp8 for a mixture of experts"),
    ],
)
def test_a_model_without_a_place_in_the_format_is_refused(
    family: str,
    fields: dict[str, Any],
    quant_format: str,
    message: str,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_model(family, tied=False, **{"num_hidden_layers": 1, **fields}).save_pretrained(tmp_path / "model")
    assert run("quantize", *words(tmp_path / "model", files, tmp_path / "out", format=quant_format)) == 2
    assert message in capsys.readouterr().err


def test_directories_that_hold_something_and_families_that_are_not_ours_are_refused(
    model_dir: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert run("quantize", *words(model_dir, files, tmp_path / "full")) == 2
    assert "which is not empty, but must be an empty directory or absent" in capsys.readouterr().err
    assert run("quantize", *words(model_dir, files, tmp_path / "full" / "notes.txt")) == 2
    assert "a file or link, but must be a directory or absent" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    assert run("quantize", *words(tmp_path / "other", files, tmp_path / "out")) == 2
    assert "model_type is 'gpt2', but must be one of" in capsys.readouterr().err


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(
    model_dir: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    make_model("llama", tied=False, vocab_size=60, hidden_size=64, intermediate_size=128).save_pretrained(
        tmp_path / "model"
    )
    assert run("quantize", *words(tmp_path / "model", files, tmp_path / "out")) == 2
    assert "but must be less than config.json's vocab_size 60" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("named", "held", "wanted"),
    [
        (None, torch.float16, torch.float16),
        ("float16", torch.float32, torch.float16),
        ("float16", torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_what_stays_is_stored_as_the_files_are(
    named: str | None, held: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
    make_model("llama", tied=False, num_hidden_layers=1).to(held).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": named}))
    assert stored_dtype(read_architecture(tmp_path), HFWeights(tmp_path)) == wanted


def test_a_disk_that_is_full_ends_in_one_line_and_leaves_nothing(
    model_dir: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # stands in for a full disk: files cannot grow further
    try:
        status = run("quantize", *words(model_dir, files, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith(f"error: --save '{tmp_path / 'out'}' cannot be written: ")
    assert not list(tmp_path.iterdir())
