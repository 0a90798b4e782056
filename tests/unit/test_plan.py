"""tools/plan.py's arithmetic: against published formulas, against a hand count, and what wrong input gets."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.plan_arguments import PlanRequest, parse_plan, plan_given_layout, search_layouts
from megatron_fipo.planning.activations import activation_bytes, chunk_bytes, chunks_in_flight, layer_bytes
from megatron_fipo.planning.engines import GIB, Engine, engine_bytes, token_bytes, weight_bytes
from megatron_fipo.planning.memory import Plan
from megatron_fipo.planning.show import plan_values, show_layouts, show_plan
from megatron_fipo.planning.states import num_parameters, state_bytes
from megatron_fipo.planning.training import OptimizerBytes, Recompute, Training
from megatron_fipo.weights.architecture import read_architecture

MODELS = Path(__file__).resolve().parent / "recipe_models"
QWEN_32B = MODELS / "Qwen2.5-32B"
PUBLISHED_PARAMETERS = {  # of the models' cards; Qwen2.5-Math-7B is 7.62 billion as Qwen2.5-7B is
    "Qwen2.5-32B": 32.8e9,
    "Qwen2.5-Math-7B-32k": 7.62e9,
    "Qwen3-30B-A3B": 30.5e9,
    "SmolLM2-135M-Instruct": 134.5e6,
}
ON_16_NODES = ("--hf-checkpoint", str(QWEN_32B), "--nodes", "16", "--preset", "fipo-qwen2.5-32b", "--bf16")
LAYOUT_32B = (
    *("--tensor-model-parallel-size", "8", "--sequence-parallel", "--pipeline-model-parallel-size", "2"),
    *("--context-parallel-size", "2", "--max-tokens-per-micro-batch", "11264"),
    *("--rollout-num-gpus-per-engine", "4", "--sglang-mem-fraction-static", "0.7"),
)


def training(model: str = "Qwen2.5-32B", num_ranks: int = 1, **changes: Any) -> Training:
    sizes = {name: changes.pop(name) for name in ("tp", "pp", "cp", "vpp", "ep", "etp") if name in changes}
    layout = ParallelLayout.for_world(num_ranks, 0, sequence_parallel=sizes.get("tp", 1) > 1, **sizes)
    fields: dict[str, Any] = {
        "arch": read_architecture(MODELS / model),
        "layout": layout,
        "vocab_divisible_by": 1,
        "dtype_bytes": 2,
        "gradient_bytes": 4,
        "optimizer": OptimizerBytes(4, 8, 0),
        "is_sharded": True,
        "overlaps_gradients": False,
        "transformer_impl": "transformer_engine",
        "on_cpu": False,
        "rows": 8192,
        "longest": 8192,
        "micro_batches": 64,
        "chunk_size": 1024,
    }
    return Training(**{**fields, **changes})


def plan(*more: str, without: tuple[str, ...] = ()) -> Plan:
    words = [word for word in (*ON_16_NODES, *LAYOUT_32B, *more) if word not in without]
    return plan_given_layout(parse_plan(words)).plan


@pytest.mark.parametrize("model", PUBLISHED_PARAMETERS)
def test_parameters_are_those_of_the_models_card(model: str) -> None:
    assert num_parameters(training(model), 0) == pytest.approx(PUBLISHED_PARAMETERS[model], rel=0.005)


@pytest.mark.parametrize(
    ("model", "tp", "pp", "num_ranks"), [("Qwen2.5-32B", 8, 2, 64), ("Qwen2.5-Math-7B-32k", 4, 1, 32)]
)
def test_states_take_6_and_12_over_dp_bytes_a_parameter_as_megatron_lm_reckons(
    model: str, tp: int, pp: int, num_ranks: int
) -> None:
    one = training(model, num_ranks, tp=tp, pp=pp)
    for stage in range(pp):
        expected = (6 + 12 / one.layout.dp) * num_parameters(one, stage)
        assert state_bytes(one, stage).total == pytest.approx(expected, rel=1e-3)


def test_stages_and_tensor_parallel_ranks_add_up_to_the_model() -> None:
    whole = num_parameters(training(), 0)
    one = training(num_ranks=16, tp=4, pp=4)
    cut = 4 * sum(num_parameters(one, stage) for stage in range(4))
    norms = (2 * 64 + 1) * 5120
    assert cut == whole + 3 * norms  # every tensor-parallel rank has them


def test_experts_are_sharded_over_the_ranks_that_hold_the_same_ones() -> None:
    one = training("Qwen3-30B-A3B", 32, tp=4, pp=2, cp=2, ep=8, etp=1)
    expert = 24 * 16 * 3 * 2048 * 768  # layers x experts of a rank x weights
    states, dense = state_bytes(one, 1), num_parameters(one, 1) - expert
    assert states.parameters == pytest.approx(2 * (dense + expert), rel=1e-4)
    assert states.optimizer == pytest.approx(12 * (dense / 4 + expert / 2), rel=1e-3)


def test_optimizer_options_count() -> None:
    states = plan().states
    less = plan("--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16").states
    assert less.optimizer == pytest.approx(states.optimizer / 2, rel=1e-6)  # 2 + 2 + 2 of 12: master as a remainder
    assert plan("--grad-reduce-in-bf16").states.gradients < states.gradients


def test_a_layer_is_hand_counted() -> None:
    """Korthikanti et al. 2022, section 4.1, for RMSNorm, grouped queries and SwiGLU; bytes of a token in bf16."""
    one = training()
    hidden, queries, keys, ffn, heads, dim = 5120, 40 * 128, 8 * 128, 27648, 40, 128
    norms = 2 * (2 * hidden + 2 * hidden + 4)  # each keeps its input and its output, and 1 / rms
    attention = 2 * (queries + 2 * keys) + 2 * (queries + keys) + 2 * queries + 4 * heads  # qkv, rotated, output, sums
    rope = 4 * 2 * dim
    assert layer_bytes(one) / one.rows == norms + attention + rope + 2 * 5 * ffn
    assert layer_bytes(replace(one, fuses_swiglu=True)) / one.rows == norms + attention + rope + 2 * 3 * ffn


def test_tensor_and_sequence_parallelism_cut_a_layer_evenly() -> None:
    """Korthikanti et al. 2022, equation 4: everything is divided by t. RoPE's sines, which they have not, are not."""
    rope = 8192 * 4 * 2 * 128
    assert 8 * (layer_bytes(training(num_ranks=8, tp=8)) - rope) == pytest.approx(
        layer_bytes(training()) - rope, rel=1e-9
    )


def test_full_recomputation_keeps_a_layers_input() -> None:
    """Korthikanti et al. 2022, section 5: 2 s b h bytes a layer."""
    one = training(recompute=Recompute("full", "uniform", 1))
    saved, again = chunk_bytes(one)
    assert saved == 64 * 2 * 8192 * 5120
    assert again == layer_bytes(one)
    assert chunk_bytes(replace(one, recompute=Recompute("full", "uniform", 4)))[0] == saved / 4
    first = chunk_bytes(replace(one, recompute=Recompute("full", "block", 63)))[0]
    assert first == 63 / 64 * saved + again


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_the_first_stage_holds_as_many_layers_as_the_model_has(pp: int) -> None:
    """Korthikanti et al. 2022, section 4.2.3: p micro-batches of L / p layers; interleaved L (1 + (p - 1) / (p m))."""
    one = training(num_ranks=pp, pp=pp)
    assert chunks_in_flight(one, 0) * one.layers_per_chunk == 64
    assert chunks_in_flight(one, pp - 1) == 1
    assert chunks_in_flight(replace(one, micro_batches=1), 0) == 1
    vpp = 64 // pp // 2
    interleaved = training(num_ranks=pp, pp=pp, vpp=vpp)
    layers = chunks_in_flight(interleaved, 0) * interleaved.layers_per_chunk
    assert layers == pytest.approx(64 * (1 + (pp - 1) / (pp * vpp)))


def test_chunks_bound_the_logits() -> None:
    one = training("SmolLM2-135M-Instruct", recompute=Recompute("full", "uniform", 1))
    whole, chunk = (activation_bytes(replace(one, chunk_size=size), 0) for size in (2**31, 1024))
    assert whole.logits == 8192 * 49152 * 2
    assert chunk.logits == 1024 * 49152 * 2
    assert chunk.working - whole.working == 4 * 49152 * 576  # the sum over the chunks in fp32


def test_a_token_in_the_cache_is_keys_and_values_of_every_layer() -> None:
    def engine(tp: int, **changes: Any) -> Engine:
        fields = {"is_fp8": False, "cache_bytes": 2.0, "fraction": 0.7, "max_total_tokens": None, "longest": 22528}
        return Engine(arch=read_architecture(QWEN_32B), tp=tp, dtype_bytes=2, **{**fields, **changes})

    assert token_bytes(engine(1)) == 2 * 8 * 128 * 64 * 2
    assert token_bytes(engine(4)) == 2 * 2 * 128 * 64 * 2
    assert token_bytes(engine(16)) == 2 * 1 * 128 * 64 * 2  # heads are repeated
    assert token_bytes(engine(4, cache_bytes=1.0)) == 2 * 2 * 128 * 64
    assert weight_bytes(engine(1)) == pytest.approx(2 * 32.76e9, rel=0.001)
    assert weight_bytes(engine(4)) == pytest.approx(weight_bytes(engine(1)) / 4, rel=0.001)
    assert 0.5 < weight_bytes(engine(4, is_fp8=True)) / weight_bytes(engine(4)) < 0.55
    found = engine_bytes(engine(4), 80 * GIB, 80 * GIB)
    assert found.weights + found.cache == pytest.approx(0.7 * 80 * GIB, rel=1e-5)
    assert engine_bytes(engine(1, fraction=0.5), 80 * GIB, 80 * GIB).cache_tokens == 0
    assert engine_bytes(engine(4, max_total_tokens=1000), 80 * GIB, 80 * GIB).cache_tokens == 1000


def test_turns_hold_what_is_on_the_gpu_in_them() -> None:
    training_turn, syncing, generating = plan().turns
    assert set(training_turn.parts) >= {"parameters", "gradients", "optimizer", "activations", "reserve"}
    assert set(syncing.parts) == {"parameters", "engine weights", "weight buckets", "reserve"}
    assert set(generating.parts) == {"engine weights", "KV cache", "engine runtime", "reserve"}
    stays = plan("--no-offload-trainer").turns[2]
    assert set(stays.parts) - set(generating.parts) == {"parameters", "gradients", "optimizer"}
    apart = plan("--rollout-placement", "disaggregated", "--rollout-num-engines", "16")
    assert set(apart.turns[1].parts) == {"parameters", "gradients", "optimizer", "weight buckets", "reserve"}
    assert apart.turns[2].parts == generating.parts
    assert apart.main_memory_per_node == 0
    states = plan().states
    assert plan().main_memory_per_node == 8 * (states.parameters + states.optimizer)
    reference = plan("--kl-coef", "0.01").main_memory_per_node - plan().main_memory_per_node
    assert reference == 8 * states.parameters


def test_experts_that_are_recomputed_by_their_old_flag_count_as_by_the_new_one() -> None:
    model = ("--hf-checkpoint", str(MODELS / "Qwen3-30B-A3B"), "--bf16", "--nodes", "4")
    layout = (*model, "--expert-model-parallel-size", "8", "--max-tokens-per-micro-batch", "22528")
    modules = ("--recompute-granularity", "selective", "--recompute-modules", "core_attn", "moe")
    old, new, none = (
        plan_given_layout(parse_plan([*layout, *words])).plan.turns[0].parts["activations"]
        for words in (("--moe-layer-recompute",), modules, ())
    )
    assert old == new < none / 2


def test_a_save_copies_each_shard_and_the_weights_once() -> None:
    model = ("--hf-checkpoint", str(MODELS / "Qwen2.5-Math-7B-32k"), "--bf16", "--rollout-max-response-len", "10240")
    layout = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--max-tokens-per-micro-batch", "12288")
    one_node, two_nodes, apart = (
        plan_given_layout(parse_plan([*model, *layout, *more])).plan.save_memory_per_node
        for more in (
            ("--nodes", "1"),
            ("--nodes", "2"),
            ("--num-gpus", "16", "--gpus-per-node", "1"),
        )
    )
    assert one_node == pytest.approx(14 * 7.62e9, rel=0.005)
    assert two_nodes == pytest.approx((12 / 2 + 2) * 7.62e9, rel=0.005)  # the first node has all of the weights
    assert apart == pytest.approx((12 / 16 + 2 / 2) * 7.62e9, rel=0.005)
    on_cpu = ("--device", "cpu", "--num-gpus", "2", "--gpu-memory-gib", "200")
    assert plan_given_layout(parse_plan([*model, *layout, *on_cpu])).plan.save_memory_per_node == 0


def test_the_worst_pipeline_rank_is_shown() -> None:
    found = plan()
    assert found.worst_stage == 0
    assert found.stage_totals[0] == found.turns[0].total > found.stage_totals[1]


def test_what_does_not_fit_says_why() -> None:
    found = plan("--gpu-memory-gib", "40")
    assert not found.fits
    (problem,) = (problem for problem in found.problems if problem.startswith("training takes 5"))
    assert "activations" in problem
    assert problem.endswith("): --recompute-granularity full keeps least")  # the budget is one longest sequence
    words = ("--gpu-memory-gib", "20", "--max-tokens-per-micro-batch", "20000", "--recompute-granularity", "full")
    problem = plan(*words, "--recompute-method", "uniform", "--recompute-num-layers", "4").problems[0]
    assert problem.endswith("): --max-tokens-per-micro-batch may be as low as 11264")
    (problem,) = plan("--sglang-mem-fraction-static", "0.2").problems
    assert "raise --sglang-mem-fraction-static (0.20)" in problem
    (problem,) = plan("--sglang-mem-fraction-static", "0.9").problems
    assert problem.startswith("generating takes")
    assert plan("--sglang-mem-fraction-static", problem.split()[-3]).fits


def search(model: str, *words: str) -> PlanRequest:
    return parse_plan(["--hf-checkpoint", str(MODELS / model), "--bf16", *words])


def test_layouts_are_searched_and_every_other_one_has_its_reason() -> None:
    words = ("--nodes", "1", "--rollout-max-response-len", "10240", "--sglang-mem-fraction-static", "0.7")
    fitting, rejected = search_layouts(search("Qwen2.5-Math-7B-32k", *words))
    assert fitting
    assert all(one.plan.fits and one.plan.peak <= 80 * GIB for one in fitting)
    costs = [one.cost.seconds_per_token for one in fitting]
    assert costs == sorted(costs)
    reasons = {(one.sizes.tp, one.sizes.pp, one.sizes.cp): one.reason for one in rejected}
    assert "divisor of the model's 28 attention heads" in reasons[8, 1, 1]
    assert "divisor of the model's 28 layers" in reasons[1, 8, 1]
    recomputing = {one.plan.training.recompute.granularity for one in fitting}
    assert recomputing == {None, "full"}  # the latter where it would not fit without
    again = plan_given_layout(search("Qwen2.5-Math-7B-32k", *words, *fitting[0].flags))
    assert again.plan == fitting[0].plan  # the flags it names make the layout it shows


def test_a_small_gpu_has_no_layout() -> None:
    request = search("Qwen2.5-32B", "--num-gpus", "1", "--gpu-memory-gib", "24")
    fitting, rejected = search_layouts(request)
    assert not fitting
    (only,) = rejected
    assert only.recomputes
    assert "training takes" in only.reason


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--num-layers", "63"), "^--num-layers is 63, but the checkpoint's config.json says 64$"),
        (
            ("--moe-grouped-gemm",),
            "^--moe-grouped-gemm is True, but must be absent: the checkpoint's model .qwen2. has",
        ),
        (("--rollout-max-response-len", "131072"), "133120, but must be at most the checkpoint's context, 131072"),
        (("--rollout-num-gpus-per-engine", "3"), "^--rollout-num-gpus-per-engine is 3, but must be a divisor"),
    ],
)
def test_flags_that_are_wrong_in_any_layout_are_an_error_of_the_search(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        search_layouts(search("Qwen2.5-32B", "--nodes", "16", *words))


def test_tables_and_json_show_the_same() -> None:
    planned = plan_given_layout(parse_plan([*ON_16_NODES, *LAYOUT_32B]))
    text = io.StringIO()
    show_plan(Console(file=text, width=118), planned.plan, planned.cost)
    values = json.loads(json.dumps(plan_values(planned.plan, planned.cost)))
    assert f"{values['turns']['training']['activations'] / GIB:.2f}" in text.getvalue()
    assert values["turns"]["training"]["all"] == planned.plan.turns[0].total
    bars = [line for line in text.getvalue().splitlines() if "|" in line]
    assert {len(bar) for bar in bars} == {len("generating ") + 66}
    shares = {part: size / planned.plan.cluster.gpu_bytes for part, size in planned.plan.turns[0].parts.items()}
    assert bars[0].count("A") == pytest.approx(64 * shares["activations"], abs=1)
    table = io.StringIO()
    show_layouts(Console(file=table, width=118), [(planned.plan, planned.cost)], [])
    assert "1 layouts fit" in table.getvalue()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--hf-checkpoint is ''"),
        (("--hf-checkpoint", "missing"), "missing/config.json"),
        (("--hf-checkpoint", str(QWEN_32B), "--gpu-memory-gib", "0"), "--gpu-memory-gib is 0.0"),
        (("--hf-checkpoint", str(QWEN_32B), "--gpu-memory-gib", "much"), "--gpu-memory-gib is 'much'"),
        (("--hf-checkpoint", str(QWEN_32B), "--reserve-gib", "80"), "--reserve-gib is 80.0"),
        (("--hf-checkpoint", str(QWEN_32B), "--nodes", "0"), "--nodes is 0"),
        (("--hf-checkpoint", str(QWEN_32B), "--num-gpus", "12"), "--num-gpus is 12"),
        (("--hf-checkpoint", str(QWEN_32B), "--num-gpus", "16", "--nodes", "3"), "--num-gpus is 16"),
        (("--hf-checkpoint", str(QWEN_32B), "--expert-imbalance", "0.5"), "--expert-imbalance is 0.5"),
        (("--hf-checkpoint", str(QWEN_32B), "--gpu-memory", "80"), "unknown flag --gpu-memory"),
    ],
)
def test_wrong_words_are_one_line_that_names_them(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse_plan(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tensor-model-parallel-size", "3"), "--tensor-model-parallel-size"),
        (("--pipeline-model-parallel-size", "3"), "--pipeline-model-parallel-size"),
        (("--num-layers", "63"), "--num-layers"),
        (("--moe-grouped-gemm",), "has no experts"),
        (("--max-tokens-per-micro-batch", "1024"), "--max-tokens-per-micro-batch is 1024"),
        (("--sglang-kv-cache-dtype", "nvfp4"), "--sglang-kv-cache-dtype"),
        (("--rollout-num-gpus-per-engine", "3"), "--rollout-num-gpus-per-engine is 3"),
    ],
)
def test_a_layout_that_the_program_would_refuse_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(*words)
