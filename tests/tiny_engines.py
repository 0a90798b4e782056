"""Real engines on tiny random models, and what they must answer."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_fipo.rollout.interface import LOOPBACK
from megatron_fipo.rollout.process_group import group_members
from megatron_fipo.rollout.server_process import start_engine
from megatron_fipo.rollout.sglang_engine import SGLangEngine
from megatron_fipo.types import Completion, GenerateRequest, SamplingSettings
from megatron_fipo.weights.bucket import make_buckets

VOCAB = 160
EOS = 7
PROMPTS = [list(range(20, 20 + length)) for length in (3, 9, 17, 30)]
SHAPE = dict(  # noqa: C408
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=EOS,
)


def tiny_llama(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False, initializer_range=0.3)).eval()


def tiny_qwen2(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True, initializer_range=0.3)).eval()


def tiny_experts(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **experts, head_dim=16, initializer_range=0.3)).eval()


def start(
    model: PreTrainedModel, directory: Path, *, tp_size: int = 1, host: str = LOOPBACK, **server_args: object
) -> SGLangEngine:
    model.save_pretrained(directory / "model")
    return start_engine(
        str(directory / "model"),
        name="engine0",
        dtype="float32",
        tp_size=tp_size,
        context_length=256,
        random_seed=0,
        log_path=str(directory / "engine.log"),
        start_timeout_s=150,
        request_timeout_s=120,
        server_args={"max_total_tokens": 8192, **server_args},
        use_cpu=True,
        host=host,
    )


def requests_for(
    prompts: list[list[int]], *, num_samples: int, length: int, temperature: float
) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            uid=f"{index}/{sample}",
            prompt_ids=np.asarray(prompt, dtype=np.int64),
            sampling=SamplingSettings(max_response_len=length, temperature=temperature),
            seed=1000 * index + sample,
        )
        for index, prompt in enumerate(prompts)
        for sample in range(num_samples)
    ]


def weights_of(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    tied = model.config.tie_word_embeddings
    return [(name, tensor) for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")]


def push(engine: SGLangEngine, weights: list[tuple[str, torch.Tensor]], version: int) -> None:
    engine.begin_weight_update()
    for bucket in make_buckets(weights, bucket_bytes=64 << 10):
        engine.push_bucket(bucket)
    engine.end_weight_update(version)


def greedy(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + length and (len(ids) == len(prompt) or ids[-1] != EOS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def logprobs_under(model: PreTrainedModel, prompt: list[int], response: list[int]) -> np.ndarray:
    """[R] log-probs of the response's tokens at temperature 1."""
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    positions = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return logprobs[positions, torch.tensor(response)].numpy()


def own_segments() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"torch_{os.getpid()}_")]


def left_behind(before: set[str]) -> list[str]:
    """What an engine may leave in /dev/shm. Segments of engines that other programs run meanwhile are mapped."""
    new = [name for name in set(os.listdir("/dev/shm")) - before if name.startswith(("sglang", "sem.mp"))]
    maps = ""
    for path in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process ended meanwhile
            maps += path.read_text()
    return [name for name in new if name not in maps]


def generate_for_ever(engine: SGLangEngine, requests: list[GenerateRequest]) -> None:
    while True:
        engine.generate(requests)


def listening_addresses(engine: SGLangEngine) -> tuple[set[str], set[Path]]:
    """Where the engine's processes can be reached: internet addresses, and files of unix sockets."""
    addresses, paths = set(), set()
    for process in group_members(engine.process_id):
        for connection in process.net_connections("all"):
            if connection.family == socket.AF_UNIX:
                paths |= {Path(connection.laddr)} if connection.laddr else set()
            elif connection.status == "LISTEN" or connection.type == socket.SOCK_DGRAM:
                addresses.add(connection.laddr.ip)
    return addresses, paths


def greedy_matches(engine: SGLangEngine, model: PreTrainedModel) -> bool:
    completions = engine.generate(requests_for(PROMPTS, num_samples=1, length=12, temperature=0.0))
    return all(
        completion.token_ids.tolist() == greedy(model, prompt, 12)
        and np.abs(completion.logprobs - logprobs_under(model, prompt, completion.token_ids.tolist())).max() < 2e-5
        for prompt, completion in zip(PROMPTS, completions, strict=True)
    )


def bits(completions: list[Completion]) -> list[tuple[str, list[int], bytes]]:
    return [(item.uid, item.token_ids.tolist(), item.logprobs.tobytes()) for item in completions]
