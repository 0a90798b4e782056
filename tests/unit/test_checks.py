"""What is found wrong before anything is started: ranks, devices, the checkpoint, the layout, directories."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_fipo.arguments import Settings, parse_arguments
from megatron_fipo.checks import (
    check_checkpoint,
    check_layer_flags,
    check_run,
    choose_device,
    choose_transformer_impl,
    ranks_from_environment,
)
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights.architecture import Architecture, hf_shapes, read_architecture

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
ALONE = {"RANK": "0", "WORLD_SIZE": "1"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    shapes = hf_shapes(read_architecture(directory))
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, directory / "model.safetensors")
    return directory


def parse(checkpoint: Path, *flags: str, output_dir: Path | str = "runs/none") -> Settings:
    small = ["--rollout-batch-size", "4", "--n-samples-per-prompt", "2", "--num-updates-per-rollout", "2"]
    lengths = ["--rollout-max-prompt-len", "64", "--rollout-max-response-len", "128", "--overlong-buffer-len", "16"]
    where = ["--hf-checkpoint", str(checkpoint), "--task", "chain_sum", "--output-dir", str(output_dir)]
    return parse_arguments([*where, *small, *lengths, *flags])


def test_a_rank_learns_its_place_from_torchrun_or_slurm() -> None:
    assert ranks_from_environment({"RANK": "3", "WORLD_SIZE": "8"}) == (3, 8)
    assert ranks_from_environment({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) == (1, 2)
    both = {"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert ranks_from_environment(both) == (3, 8)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "RANK and WORLD_SIZE are not set: start with torchrun"),
        ({"RANK": "0"}, "RANK and WORLD_SIZE are not set"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "the variable RANK is 'x', but must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "the variable WORLD_SIZE is '-1', but must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"the variable RANK is 2, but must be less than WORLD_SIZE \(2\)"),
    ],
)
def test_an_environment_without_a_place_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks_from_environment(environment)


def test_a_machine_without_cuda_trains_on_its_cpu(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags in ((), ("--device", "cpu")):
        device = choose_device(parse(checkpoint, *flags).megatron.device)
        assert device == torch.device("cpu")
        assert choose_transformer_impl(parse(checkpoint, *flags), device) == "local"
    with pytest.raises(ValueError, match="--device is 'cuda', but must be cpu or auto: no CUDA device is visible"):
        choose_device(parse(checkpoint, "--device", "cuda").megatron.device)


def test_a_machine_with_cuda_uses_the_ranks_own_device(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(parse(checkpoint).megatron.device) == torch.device("cuda", 3)
    with pytest.raises(ValueError, match="--device is 'cpu', but must be cuda or auto where a CUDA device is visible"):
        choose_device(parse(checkpoint, "--device", "cpu").megatron.device)
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert choose_device(parse(checkpoint, "--device", "cuda").megatron.device) == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 3), torch.device("cuda", 1)]


def test_layers_are_transformer_engines_on_cuda_unless_told_otherwise(checkpoint: Path) -> None:
    cuda = torch.device("cuda", 0)
    assert choose_transformer_impl(parse(checkpoint), cuda) == "transformer_engine"
    assert choose_transformer_impl(parse(checkpoint, "--transformer-impl", "local"), cuda) == "local"
    with pytest.raises(ValueError, match="--transformer-impl is 'transformer_engine', but must be local where"):
        choose_transformer_impl(parse(checkpoint, "--transformer-impl", "transformer_engine"), torch.device("cpu"))


def test_a_gpu_without_transformer_engine_is_told_what_to_install(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is made up, the absence is real."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for flags in ((), ("--transformer-impl", "transformer_engine")):
        with pytest.raises(ValueError, match="Engine is not installed: NVTE_PYTORCH_FORCE_BUILD=TRUE pip install"):
            check_run(parse(checkpoint, *flags, output_dir=tmp_path), ALONE)
    with pytest.raises(ValueError, match="NVIDIA's Apex, but Apex is not installed: APEX_CPP_EXT=1"):
        check_run(parse(checkpoint, "--transformer-impl", "local", output_dir=tmp_path), ALONE)
    flags = ("--transformer-impl", "local", "--no-gradient-accumulation-fusion")
    assert check_run(parse(checkpoint, *flags, output_dir=tmp_path), ALONE).transformer_impl == "local"


def test_a_checkpoint_that_fits_comes_back_read(checkpoint: Path) -> None:
    arch, weights = check_checkpoint(parse(checkpoint, "--num-layers", "4"), ParallelLayout(tp=2, pp=2, etp=2))
    assert (arch.family, arch.num_layers, arch.hidden_size, arch.vocab_size, arch.tied) == ("qwen2", 4, 48, 50, True)
    assert set(hf_shapes(arch)) == set(weights.names)


@pytest.mark.parametrize(
    ("flags", "layout", "fragments"),
    [
        (["--num-layers", "5", "--hidden-size", "64"], {}, ["--num-layers", "5", "4", "; ", "--hidden-size"]),
        ([], {"pp": 3}, ["--pipeline-model-parallel-size", "3", "4"]),
        ([], {"tp": 4}, ["--tensor-model-parallel-size", "4"]),
        ([], {"dp": 5}, ["--global-batch-size is 4, but must be at least the number of data-parallel ranks (5)"]),
        (["--rollout-num-gpus-per-engine", "4"], {}, ["--rollout-num-gpus-per-engine is 4", "6 attention heads"]),
        (["--rollout-num-gpus-per-engine", "3"], {}, ["--rollout-num-gpus-per-engine is 3", "64 FFN channels"]),
        (["--sglang-ep-size", "2"], {}, ["--sglang-ep-size is 2", "divisor of --rollout-num-gpus-per-engine (1)"]),
        (["--sglang-quantization", "fp8"], {}, ["--sglang-quantization is 'fp8'", "--rollout-fp8"]),
        (
            ["--rollout-max-prompt-len", "200"],
            {},
            ["--rollout-max-prompt-len + --rollout-max-response-len is 328", "256 tokens", "config.json"],
        ),
    ],
)
def test_what_does_not_fit_the_checkpoint_names_flag_and_value(
    flags: list[str], layout: dict[str, int], fragments: list[str], checkpoint: Path
) -> None:
    with pytest.raises(ValueError) as raised:
        check_checkpoint(parse(checkpoint, *flags), ParallelLayout(**layout))
    for fragment in fragments:
        assert fragment in str(raised.value)


def test_a_directory_that_is_no_checkpoint_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        check_checkpoint(parse(tmp_path), ParallelLayout())
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 5}))
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"model\.layers\.4"):
        check_checkpoint(parse(tmp_path), ParallelLayout())


def test_a_good_command_line_passes_and_creates_nothing(checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--save", str(tmp_path / "a" / "save"), "--export-hf", str(tmp_path / "b")]
    checked = check_run(parse(checkpoint, *flags, output_dir=tmp_path / "out" / "run"), ALONE)
    assert checked.layout == ParallelLayout()
    assert checked.arch.num_layers == 4
    assert list(tmp_path.iterdir()) == []


def test_the_layout_is_the_worlds(checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    checked = check_run(parse(checkpoint, *flags, output_dir=tmp_path), {"RANK": "3", "WORLD_SIZE": "4"})
    assert checked.layout == ParallelLayout(tp=2, dp=2, sequence_parallel=True, rank=3, etp=2)
    with pytest.raises(ValueError, match=r"is 2, but must be a divisor of the number of ranks \(1\)"):
        check_run(parse(checkpoint, *flags, output_dir=tmp_path), ALONE)


@pytest.mark.parametrize("flag", ["--output-dir", "--save", "--export-hf", "--record-rollouts", "--tensorboard-dir"])
def test_a_directory_to_write_to_must_not_be_a_file(flag: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = [] if flag == "--output-dir" else ["--output-dir", str(tmp_path / "out")]
    settings = parse(checkpoint, *out, flag, str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match=rf"{flag} is '.*below', but must be a directory, but .*file is a file"):
        check_run(settings, ALONE)


def test_a_directory_to_write_to_must_be_writable(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_fipo.checks.os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=rf"--output-dir is '.*run', but must be writable, but {tmp_path} is not"):
        check_run(parse(checkpoint, output_dir=tmp_path / "run"), ALONE)


def test_a_fresh_run_does_not_write_over_an_old_one(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    check_run(parse(checkpoint, output_dir=tmp_path), ALONE)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"already holds the records of a run \(metrics\.jsonl\)"):
        check_run(parse(checkpoint, output_dir=tmp_path), ALONE)


def test_what_is_to_be_read_must_exist(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--load is '.*none', but must be a directory of this program's checkpoints"):
        check_run(parse(checkpoint, "--load", str(tmp_path / "none"), output_dir=tmp_path), ALONE)
    with pytest.raises(ValueError, match=r"--replay-rollouts is '.*none', but must be a directory"):
        check_run(parse(checkpoint, "--replay-rollouts", str(tmp_path / "none"), output_dir=tmp_path), ALONE)


def test_a_checkpoint_of_megatron_lm_is_not_written_beside(checkpoint: Path, tmp_path: Path) -> None:
    pretrained = tmp_path / "pretrained"
    pretrained.mkdir()
    (pretrained / "latest_checkpointed_iteration.txt").write_text("500")
    for flags in (
        ["--save", str(pretrained)],
        ["--load", str(pretrained)],
        ["--save", str(pretrained), "--load", str(pretrained)],
    ):
        with pytest.raises(
            ValueError, match=r"which holds a checkpoint of Megatron-LM's own .*--pretrained-checkpoint"
        ):
            check_run(parse(checkpoint, *flags, output_dir=tmp_path), ALONE)


def test_virtual_stages_reach_the_layout_and_overlap_on_gloo_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1", "--device", "cpu"]
    environment = {"RANK": "0", "WORLD_SIZE": "2"}
    checked = check_run(parse(checkpoint, *flags, output_dir=tmp_path), environment)
    assert (checked.layout.pp, checked.layout.vpp) == (2, 2)
    with pytest.raises(ValueError, match="--overlap-p2p-communication-warmup-flush is True, but must be absent"):
        check_run(
            parse(checkpoint, *flags, "--overlap-p2p-communication-warmup-flush", output_dir=tmp_path), environment
        )


def test_flags_of_layers_are_compared_with_the_model_and_their_implementation(checkpoint: Path) -> None:
    dense = check_checkpoint(parse(checkpoint), ParallelLayout())[0]
    experts = replace(dense, family="qwen3_moe", num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=8)

    def check(arch: Architecture, transformer_impl: str, *flags: str) -> None:
        check_layer_flags(parse(checkpoint, *flags).megatron, arch, transformer_impl)

    check(experts, "transformer_engine", "--moe-grouped-gemm", "--fp8-format", "hybrid")
    check(experts, "local", "--moe-router-dtype", "fp64")
    with pytest.raises(ValueError, match="--moe-router-dtype is 'fp32', but must be absent: the checkpoint's model"):
        check(dense, "local", "--moe-router-dtype", "fp32")
    for flags in (
        ["--moe-grouped-gemm"],
        ["--fp8-format", "hybrid"],
        ["--cp-comm-type", "p2p"],
        ["--tp-comm-overlap"],
        ["--use-precision-aware-optimizer"],
    ):
        with pytest.raises(ValueError, match=f"{flags[0]} is .*, but must be absent with --transformer-impl local"):
            check(experts, "local", *flags)
    acts = ["--recompute-granularity", "selective", "--recompute-modules", "layernorm", "moe_act"]
    check(experts, "transformer_engine", *acts, "--moe-grouped-gemm")
    with pytest.raises(
        ValueError, match=r"^--recompute-modules is 'moe_act', but must be another without --moe-grouped"
    ):
        check(experts, "transformer_engine", *acts)
    with pytest.raises(
        ValueError, match="--recompute-modules is 'layernorm', but must be another with --transformer-im"
    ):
        check(experts, "local", *acts[:-1])  # core's code for it would end in a NameError
    check(experts, "local", *acts[:3], "core_attn", "mlp", "moe")
    full = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers"]
    check(dense, "local", *full, str(dense.num_layers))
    stages = ["--pipeline-model-parallel-size", "2"]
    with pytest.raises(
        ValueError, match=f"num-layers is {dense.num_layers}, but must be a divisor of a pipeline stage's"
    ):
        check(dense, "local", *full, str(dense.num_layers), *stages)  # core's code would run past the last layer
    with pytest.raises(ValueError, match=r"^--moe-router-dtype is 'fp32', .*; --fp8-format is 'hybrid', [^;]*$"):
        check(dense, "local", "--moe-router-dtype", "fp32", "--fp8-format", "hybrid")
    with pytest.raises(ValueError, match=r"--cp-comm-type is 'a2a', .* 2 query groups .* --context-parallel-size 4"):
        check(dense, "transformer_engine", "--context-parallel-size", "4", "--cp-comm-type", "a2a")
    with pytest.raises(ValueError, match="--num-experts is 8, but the checkpoint"):
        check_checkpoint(parse(checkpoint, "--num-experts", "8"), ParallelLayout())
