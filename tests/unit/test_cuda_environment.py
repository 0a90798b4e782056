"""What CUDA and NCCL read when they start: the trainer's side and its engines' agree, and an own choice stays."""

from __future__ import annotations

import pytest

from megatron_fipo.arguments import Settings, parse_arguments
from megatron_fipo.cuda_environment import NCCL_MEMORY_VARIABLES, check_allocator, settle_cuda_environment
from megatron_fipo.rollout.server_launch import ServerStart, server_environment

APART = ("--rollout-placement", "disaggregated")
ON_GPU = ServerStart({}, "127.0.0.1", tp_size=1, architecture="LlamaForCausalLM", use_cpu=False, log_path="log")


def settings(*flags: str) -> Settings:
    return parse_arguments(["--hf-checkpoint", "model", "--task", "chain_sum", "--output-dir", "out", *flags])


def settled(*flags: str, **environment: str) -> dict[str, str]:
    settle_cuda_environment(settings(*flags), environment)
    return environment


def test_trainer_and_engines_register_nccls_memory_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NCCL_MEMORY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    trainer = settled(*APART)
    assert trainer == {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
    for name, value in trainer.items():
        monkeypatch.setenv(name, value)
    engine = server_environment(ON_GPU, "scratch")
    assert {name: engine[name] for name in NCCL_MEMORY_VARIABLES} == trainer


def test_buffers_registered_with_nccl_need_its_own_memory_on_both_sides() -> None:
    wanted = {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "1"}
    for flags in (("--use-nccl-ub",), ("--sglang-enable-symm-mem",)):
        assert settled(*APART, *flags) == wanted, flags


def test_what_is_set_already_stays_and_nothing_else_is_touched() -> None:
    assert settled() == {}
    own = {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert settled(*APART, "--tensor-model-parallel-size", "2", **own) == own


@pytest.mark.parametrize("flag", ["--tensor-model-parallel-size", "--context-parallel-size"])
def test_communication_that_overlaps_has_one_connection(flag: str) -> None:
    assert settled(flag, "2") == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_refused_beside_colocated_engines(name: str) -> None:
    chosen = {name: "max_split_size_mb:64, expandable_segments: True"}
    with pytest.raises(ValueError, match=f"the variable {name} is .*expandable_segments with --rollout-placement"):
        check_allocator(settings(), chosen)
    check_allocator(settings(*APART), chosen)
    check_allocator(settings(), {name: "expandable_segments:False"})


def test_an_engine_on_a_gpu_compiles_though_the_trainers_shell_says_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert "TORCHDYNAMO_DISABLE" not in server_environment(ON_GPU, "scratch")
