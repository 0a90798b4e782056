"""The actor on one rank against Hugging Face transformers, family by family, and what an update must not do silently.

Everything runs in one process group of one rank and one of two, started once each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from actor_on_ranks import make_actor, make_groups
from processes import run_ranks
from tiny_models import VOCAB, hf_logits, make_model, make_sequences, published

from megatron_fipo.config import PPOSettings
from megatron_fipo.types import TrainSequence

MODELS = {
    f"{family} {kind}": (family, kind == "tied")
    for family in ("qwen2", "qwen3", "llama")
    for kind in ("tied", "untied")
} | {"qwen3_moe untied": ("qwen3_moe", False)}
ROUND_TRIP_MODELS = {"tied": "qwen2 tied", "untied": "qwen3 untied"}  # with biases, with norms of queries and keys
VARIANTS = ["llama3 rope", "qwen3_moe not normalised"]
ROUND_TRIPS = [
    (layout, kind, dtype) for layout in ("tp2", "pp2") for kind in ("tied", "untied") for dtype in ("fp32", "bf16")
]
NUM_SEQUENCES = 8
RECOMPUTE: dict[str, dict[str, Any]] = {
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
RECOMPUTE_EXPERTS = {**RECOMPUTE, "experts": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}}


def sequences_for(model: str) -> list[TrainSequence]:
    """The usual sequences; for the scaled RoPE one of 250 tokens, where its slow rotations show."""
    sequences = make_sequences(NUM_SEQUENCES)
    if model != "llama3 rope":
        return sequences
    length = 250
    mask = np.arange(length) < length - 1
    tokens = np.random.default_rng(1).integers(0, VOCAB, length)
    advantages = np.linspace(-1, 1, length, dtype=np.float32)
    zeros, versions = np.zeros(length, dtype=np.float32), np.where(mask, 0, -1)
    return [TrainSequence("long/0", tokens, mask, advantages, zeros, versions)]


def with_llama3_rope(model: Any) -> Any:
    """The same weights under Llama 3's frequencies. Base 1e5: two of its five wavelengths are beyond the limits."""
    import transformers

    config = type(model.config)(**model.config.to_dict())
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 1e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = transformers.LlamaForCausalLM(config).eval()
    scaled.load_state_dict(model.state_dict())
    return scaled


@pytest.fixture(scope="module")
def hf_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Name -> (directory, model)."""
    models = {name: make_model(family, tied=tied) for name, (family, tied) in MODELS.items()}
    models["llama3 rope"] = with_llama3_rope(make_model("llama", tied=False))
    models["qwen3_moe not normalised"] = make_model("qwen3_moe", tied=False, norm_topk_prob=False)
    root = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(root / name.replace(" ", "-"))
    return {name: (root / name.replace(" ", "-"), model) for name, model in models.items()}


@pytest.fixture(scope="module")
def one_rank(hf_models: dict[str, tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directories = {name: str(directory) for name, (directory, _) in hf_models.items()}
    return run_ranks(tmp_path_factory.mktemp("one-rank"), 1, on_one_rank, {"directories": directories})[0]


@pytest.fixture(scope="module")
def two_ranks(hf_models: dict[str, tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directories = {kind: str(hf_models[model][0]) for kind, model in ROUND_TRIP_MODELS.items()}
    return run_ranks(tmp_path_factory.mktemp("two-ranks"), 2, on_two_ranks, {"directories": directories})[0]


def reference(model: Any, sequences: list[TrainSequence]) -> dict[str, Any]:
    """Per sequence logits [L, V], log-probs and entropies [L], and the gradients of sum(log-probs * advantages)."""
    found: dict[str, Any] = {"logits": [], "logprobs": [], "entropies": []}
    loss = torch.zeros(())
    for sequence in sequences:
        logits = hf_logits(model, sequence)
        rows = logits.log_softmax(-1)
        tokens, mask = torch.from_numpy(sequence.token_ids), torch.from_numpy(sequence.loss_mask)
        logprobs = torch.where(mask, rows.gather(1, tokens.roll(-1)[:, None])[:, 0], 0.0)
        loss = loss + (logprobs * torch.from_numpy(sequence.advantages)).sum()
        found["logits"].append(logits.detach())
        found["logprobs"].append(logprobs.detach())
        found["entropies"].append(torch.where(mask, -(rows.exp() * rows).sum(-1), 0.0).detach())
    model.zero_grad()
    loss.backward()
    found["gradients"] = published({name: p.grad.clone() for name, p in model.named_parameters()})
    return found


@pytest.mark.parametrize("model", [*MODELS, *VARIANTS])
def test_logits_logprobs_entropies_and_gradients_are_transformers(
    model: str, hf_models: dict[str, tuple[Path, Any]], one_rank: dict[str, Any]
) -> None:
    wanted, found = reference(hf_models[model][1], sequences_for(model)), one_rank[model]
    logits = torch.cat(wanted["logits"])
    assert 1.0 < logits.abs().max() < 50.0  # the scale that 1e-5, absolute, is to be read against
    assert (found["logits"][:, :VOCAB] - logits).abs().max() <= 1e-5
    for name in ("logprobs", "entropies"):
        assert len(found[name]) == len(wanted[name])
        for i, (ours, theirs) in enumerate(zip(found[name], wanted[name])):
            assert (ours - theirs).abs().max() <= 1e-5, (name, i)
    assert found["gradients"].keys() == wanted["gradients"].keys()
    for name, gradient in wanted["gradients"].items():
        largest = gradient.abs().max()
        if name.endswith("k_proj.bias"):
            # in all but the rotations it cancels in the softmax: little is left beside rounding
            largest = largest.clamp(min=0.1)
        assert largest > 1e-2, (name, largest)
        assert (found["gradients"][name] - gradient).abs().max() <= 1e-5 * largest, name


def test_weights_of_experts_that_are_not_normalised_matter(hf_models: dict[str, tuple[Path, Any]]) -> None:
    sequence = make_sequences(1)[0]
    raw, normalised = (hf_logits(hf_models[f"qwen3_moe {name}"][1], sequence) for name in ("not normalised", "untied"))
    assert (raw - normalised).abs().max() > 1e-2


def test_the_scaled_rope_is_not_the_plain_one(hf_models: dict[str, tuple[Path, Any]]) -> None:
    sequence = sequences_for("llama3 rope")[0]
    scaled, plain = (hf_logits(hf_models[name][1], sequence) for name in ("llama3 rope", "llama untied"))
    assert (scaled - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("model", "kind"),
    [*(("qwen2 untied", kind) for kind in RECOMPUTE), *(("qwen3_moe untied", kind) for kind in RECOMPUTE_EXPERTS)],
)
def test_recomputing_activations_changes_no_gradient(model: str, kind: str, one_rank: dict[str, Any]) -> None:
    plain, recomputed = one_rank[model]["gradients"], one_rank[f"recompute {model} {kind}"]
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_bf16_stays_near_fp32(hf_models: dict[str, tuple[Path, Any]], one_rank: dict[str, Any]) -> None:
    wanted = torch.cat(reference(hf_models["qwen2 untied"][1], sequences_for(""))["logprobs"])
    found = torch.cat(one_rank["bf16"]["logprobs"])
    difference = (found - wanted).abs()[wanted != 0]
    assert found.dtype == torch.float32
    # activations of 8 bits through four layers, log-probs down to -6
    assert difference.mean() <= 0.01
    assert difference.max() <= 0.05
    assert difference.max() > 1e-4  # it was bf16


def test_bf16_trains_on_fp32_master_weights(one_rank: dict[str, Any]) -> None:
    found = one_rank["bf16"]
    assert found["metrics"]["future_kl_std"] == 0.0  # old and new log-probs are one computation
    assert found["metrics"]["grad_norm"] > 0
    assert found["master_dtypes"] == ["torch.float32"]
    assert found["exported_dtypes"] == ["torch.bfloat16"]
    # an update of a tenth of a bf16 step per weight is kept by the master weights
    assert found["num_masters_off_the_bf16_grid"] > 0.9


def test_the_second_update_of_a_batch_feels_influence_and_the_first_does_not(one_rank: dict[str, Any]) -> None:
    first, second = one_rank["fipo"]
    # old log-probs are those of before the first update, for the whole batch: without that f is 1 for ever
    assert first["future_kl_std"] < 1e-6
    assert first["influence_weights_mean"] == pytest.approx(1.0, abs=1e-6)
    assert first["ppo_kl"] == pytest.approx(0.0, abs=1e-6)
    assert second["future_kl_std"] > 1e-3
    assert abs(second["influence_weights_mean"] - 1.0) > 1e-3
    assert second["influence_weights_min"] < 1.0 - 1e-3
    assert abs(second["ppo_kl"]) > 1e-4


def test_the_user_s_own_loss_trains_in_place_of_the_algorithm_s(one_rank: dict[str, Any]) -> None:
    found = one_rank["own loss"]
    dapo, own = found["metrics"]
    assert found["same parameters"]
    assert own["largest_shift"] == pytest.approx(0.0, abs=1e-6)
    numbers = {name: value for name, value in dapo.items() if isinstance(value, float)}
    assert {name: own[name] for name in numbers} == numbers
    histogram = dapo["ratio_histogram"]
    middle = histogram["counts"][len(histogram["counts"]) // 2]
    assert middle == sum(histogram["counts"]) == dapo["num_kept"]  # all ratios are 1


@pytest.mark.parametrize(("layout", "kind", "dtype"), ROUND_TRIPS)
def test_weights_come_back_bit_for_bit(
    layout: str, kind: str, dtype: str, hf_models: dict[str, tuple[Path, Any]], two_ranks: dict[str, Any]
) -> None:
    exported = two_ranks[f"{layout} {kind} {dtype}"]
    model = hf_models[ROUND_TRIP_MODELS[kind]][1]
    wanted = {name: p.detach() for name, p in model.named_parameters()}
    assert exported.keys() == wanted.keys()
    assert ("lm_head.weight" in wanted) == (kind == "untied")
    for name, value in wanted.items():
        assert torch.equal(exported[name], value.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])), name


# ---- on the ranks


def exported_weights(actor: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in actor.export_weights()}


def gradients_of(actor: Any, sequences: list[TrainSequence]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The gradients of sum(log-probs * advantages) over one micro-batch, and the logits [T, V_padded] on the way."""
    import torch.nn.functional as F

    from megatron_fipo.actor.model import run_model, unwrapped
    from megatron_fipo.actor.weights import export_weights

    policy = unwrapped(actor.chunks[0])
    hidden: list[torch.Tensor] = []
    handle = policy.decoder.register_forward_hook(lambda module, inputs, output: hidden.append(output.detach()))
    actor.chunks[0].zero_grad_buffer()
    (batch,) = actor._packed(sequences, None)
    logprobs, _ = run_model(actor.chunks[0], batch)
    handle.remove()
    (logprobs * batch.advantages).sum().backward()
    tied = policy.share_embeddings_and_output_weights
    weight = policy.shared_embedding_or_output_weight() if tied else policy.output_layer.weight
    gradients = export_weights(
        actor.chunks, actor.arch, actor.layout, actor.groups, actor.table, read=lambda p: p.main_grad
    )
    return {name: value.clone() for name, value in gradients}, F.linear(hidden[0][batch.rows, 0], weight).detach()


def on_one_rank(directories: dict[str, str]) -> dict[str, Any]:
    made = make_groups()
    results: dict[str, Any] = {}
    for name, directory in directories.items():
        actor = make_actor(directory, *made, budget=512, distributed_optimizer=False)
        sequences = sequences_for(name)
        gradients, logits = gradients_of(actor, sequences)
        logprobs, entropies = actor.old_logprobs([sequences])
        results[name] = {"gradients": gradients, "logits": logits, "logprobs": logprobs, "entropies": entropies}
    directory = directories["qwen2 untied"]
    for model, kinds in (("qwen2 untied", RECOMPUTE), ("qwen3_moe untied", RECOMPUTE_EXPERTS)):
        for kind, transformer in kinds.items():
            options = {"budget": 512, "distributed_optimizer": False, "transformer": transformer}
            actor = make_actor(directories[model], *made, **options)
            results[f"recompute {model} {kind}"] = gradients_of(actor, make_sequences(NUM_SEQUENCES))[0]
    results["bf16"] = train_in_bf16(make_actor(directory, *made, bf16=True))
    results["fipo"] = two_updates(make_actor(directory, *made))
    results["own loss"] = own_loss(make_actor(directory, *made), make_actor(directory, *made))
    return results


def settings() -> Any:
    from actor_on_ranks import settings_for

    return settings_for("fipo", "paper")


def train_in_bf16(actor: Any) -> dict[str, Any]:
    sequences = make_sequences(NUM_SEQUENCES)
    logprobs, _ = actor.old_logprobs([sequences])
    metrics = actor.update(sequences, logprobs, algorithm="fipo", settings=settings())
    masters = [p.detach() for group in actor.optimizer.param_groups for p in group["params"]]
    flat = torch.cat([p.flatten() for p in masters])
    return {
        "logprobs": logprobs,
        "metrics": metrics,
        "master_dtypes": sorted({str(p.dtype) for p in masters}),
        "exported_dtypes": sorted({str(value.dtype) for value in exported_weights(actor).values()}),
        "num_masters_off_the_bf16_grid": float((flat != flat.bfloat16().float()).float().mean()),
    }


def two_updates(actor: Any) -> list[dict[str, float]]:
    """A rollout batch in two mini-batches, as the loop does it. A step of 1e-3 is enough to see the second react."""
    sequences = make_sequences(2 * NUM_SEQUENCES)
    logprobs, _ = actor.old_logprobs([sequences])
    halves = (slice(0, NUM_SEQUENCES), slice(NUM_SEQUENCES, None))
    return [actor.update(sequences[half], logprobs[half], algorithm="fipo", settings=settings()) for half in halves]


def own_loss(actor: Any, other: Any) -> dict[str, Any]:
    """DAPO's update, and one with a loss of the user's that is DAPO's with a statistic of its own."""
    from megatron_fipo.config import CorrectionSettings

    sequences = make_sequences(NUM_SEQUENCES)
    metrics = []
    for each, path in ((actor, None), (other, "test_parity:dapo_with_a_statistic")):
        logprobs, _ = each.old_logprobs([sequences])
        correction = CorrectionSettings(custom_loss_function_path=path)
        metrics.append(
            each.update(sequences, logprobs, algorithm="dapo", settings=PPOSettings(), correction=correction)
        )
    after, wanted = exported_weights(other), exported_weights(actor)
    return {"metrics": metrics, "same parameters": all(torch.equal(after[name], wanted[name]) for name in wanted)}


def dapo_with_a_statistic(*args: Any, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    from megatron_fipo.losses import dapo_loss

    loss, info = dapo_loss(*args, **options)
    stats = info["token_stats"]
    return loss, {**info, "token_stats": {**stats, "largest_shift": stats["shift"].abs().max().reshape(1)}}


def on_two_ranks(directories: dict[str, str]) -> dict[str, dict[str, torch.Tensor]]:
    from megatron.core import parallel_state

    results = {}
    for layout, options in (("tp2", {"tp": 2}), ("pp2", {"pp": 2})):
        made = make_groups(**options)
        for kind, directory in directories.items():
            for dtype in ("fp32", "bf16"):
                actor = make_actor(directory, *made, bf16=dtype == "bf16")
                results[f"{layout} {kind} {dtype}"] = exported_weights(actor)
        parallel_state.destroy_model_parallel()
    return results
