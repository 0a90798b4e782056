"""The engine's checksums foretold: which bytes each rank's parameters hold, in any order of arrival, on CPU and GPU."""

from __future__ import annotations

import hashlib

import pytest
import torch
from tiny_models import save_model

from megatron_fipo.weights.architecture import hf_shapes, read_architecture
from megatron_fipo.weights.bucket import make_buckets
from megatron_fipo.weights.engine_layout import expected_checksums, expected_of_tensors
from megatron_fipo.weights.gpu_hash import GpuHash
from megatron_fipo.weights.hf_files import HFWeights


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def weights_in(directory, family: str):
    save_model(directory, family, tied=False)
    arch, weights = read_architecture(directory), HFWeights(directory)
    return arch, {name: weights.read(name) for name in hf_shapes(arch)}


def padded(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_zeros(num_rows - tensor.size(0), *tensor.shape[1:])])


def test_a_dense_model_on_two_ranks_of_an_engine(tmp_path) -> None:
    arch, weights = weights_in(tmp_path, "qwen2")
    found = expected_of_tensors(arch, weights.items(), tp_size=2)
    for rank in (0, 1):
        prefix = "model.layers.1."

        def cut(name: str, dim: int = 0, rank: int = rank) -> torch.Tensor:
            return weights[f"model.layers.1.{name}"].chunk(2, dim)[rank]

        for kind in ("weight", "bias"):
            qkv = torch.cat([cut(f"self_attn.{which}_proj.{kind}") for which in "qkv"])
            assert found[rank][f"{prefix}self_attn.qkv_proj.{kind}"] == sha(qkv)
        assert found[rank][f"{prefix}self_attn.o_proj.weight"] == sha(cut("self_attn.o_proj.weight", 1))
        assert found[rank][f"{prefix}input_layernorm.weight"] == sha(weights[f"{prefix}input_layernorm.weight"])
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            whole = padded(weights[name], 192)  # 131 rows, padded to a multiple of 64
            assert found[rank][name] == sha(whole.chunk(2)[rank])
        ffn = arch.ffn_hidden_size
        size = -(-ffn // 64) * 32
        gate_up = [
            padded(weights[f"{prefix}mlp.{which}_proj.weight"], 2 * size).chunk(2)[rank] for which in ("gate", "up")
        ]
        assert found[rank][f"{prefix}mlp.gate_up_proj.weight"] == sha(torch.cat(gate_up))


def test_experts_are_stacked(tmp_path) -> None:
    arch, weights = weights_in(tmp_path, "qwen3_moe")
    (found,) = expected_of_tensors(arch, weights.items(), tp_size=1)
    prefix, ffn = "model.layers.0.mlp.experts", arch.moe_ffn_hidden_size
    assert ffn is not None
    size = -(-ffn // 32) * 32
    stacked = []
    for expert in range(arch.num_moe_experts or 0):
        stacked += [padded(weights[f"{prefix}.{expert}.{which}_proj.weight"], size) for which in ("gate", "up")]
    assert found[f"{prefix}.w13_weight"] == sha(torch.cat(stacked))
    assert found["model.layers.0.mlp.gate.weight"] == sha(weights["model.layers.0.mlp.gate.weight"])


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_order_of_arrival_is_of_no_account(family: str, device_type, tmp_path) -> None:
    arch, weights = weights_in(tmp_path, family)
    pairs = list(weights.items())
    wanted = expected_of_tensors(arch, pairs, tp_size=2, device_type=device_type)
    assert expected_of_tensors(arch, reversed(pairs), tp_size=2, device_type=device_type) == wanted
    buckets = make_buckets(pairs, 4000)
    assert expected_checksums(arch, buckets, tp_size=2, device_type=device_type) == wanted


def test_missing_unknown_and_repeated_tensors_are_errors(tmp_path) -> None:
    arch, weights = weights_in(tmp_path, "llama")
    pairs = list(weights.items())
    with pytest.raises(ValueError, match=r"1 of the engine's \d+ weights were not sent: lm_head.weight"):
        expected_of_tensors(arch, pairs[:-1], tp_size=1)
    with pytest.raises(ValueError, match=r"model.norm.weight was sent, but .* or was sent it before"):
        expected_of_tensors(arch, [*pairs, ("model.norm.weight", pairs[-2][1])], tp_size=1)
    with pytest.raises(ValueError, match=r"model.other.weight was sent, but the engine has no such weight"):
        expected_of_tensors(arch, [("model.other.weight", pairs[0][1])], tp_size=1)


def gpu_hash_in_integers(data: bytes) -> str:
    """The kernel's definition word by word."""
    word, tile = 0xFFFFFFFF, 8192
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x85EBCA6B & word
        x ^= x >> 13
        x = x * 0xC2B2AE35 & word
        return x ^ (x >> 16)

    def turned(x: int, by: int) -> int:
        return ((x << by) | (x >> (32 - by))) & word

    seeds = (0x243F6A88, (0x243F6A88 * 0x9E3779B1 ^ 0xDEADBEEF) & word)
    total = 0
    for start in range(0, len(words), tile):
        sums = [0, 0]
        for index in range(start, min(start + tile, len(words))):
            for which, (factor, by) in enumerate(((0x27D4EB2D, 15), (0x165667B1, 13))):
                sums[which] += mix(words[index] ^ ((index * factor + seeds[which]) & word) ^ turned(index, by))
        first, second = (mix((part & word) ^ (4 * len(words) & word)) for part in sums)
        total = (total + (first << 32 | second)) % (1 << 64)
    total = ((total ^ (total >> 30)) * 0xBF58476D1CE4E5B9) % (1 << 64)
    total = ((total ^ (total >> 27)) * 0x94D049BB133111EB) % (1 << 64)
    return f"{total ^ (total >> 31):016x}"


@pytest.mark.parametrize("size", [2, 4, 6, 32768, 32770, 100_002])
def test_the_gpus_hash_is_its_definition_in_whatever_pieces_it_comes(size: int) -> None:
    flat = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = gpu_hash_in_integers(bytes(flat.tolist()))
    for sizes in ([size], [2] + [size - 2] * (size > 2), [size // 3, size - size // 3]):
        found = GpuHash()
        for piece in flat.split(sizes):
            found.update(piece)
        assert found.hexdigest() == wanted
