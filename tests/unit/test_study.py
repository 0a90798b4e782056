"""The small study: its task and grader, its policy's two sides, a training step of each algorithm, its statistics."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_fipo.config import LOSS_SETTINGS, CorrectionSettings
from megatron_fipo.types import GenerateRequest, RewardResult, SamplingSettings, TrainSequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "study"))

import chain_of_leaps as leaps
import study
from leaps_policy import LeapsActor, LeapsEngine, LeapsTransformer
from paired import mean_estimate, paired_difference
from study_report import read_results, report_lines

MAX_RESPONSE_LEN = 24
TINY = study.Setup(
    num_steps=1,
    prompts=4,
    samples=4,
    num_updates=2,
    max_response_len=MAX_RESPONSE_LEN,
    lr=1e-2,
    eval_samples=1,
    warm_up_batches=0,
)


@pytest.fixture(scope="module")
def control() -> Iterator[dist.ProcessGroup]:
    with study.one_process() as group:
        yield group


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's own curves.png takes longer than all these tests."""
    monkeypatch.setattr("megatron_fipo.metrics.run_logger.draw_curves", lambda *_, **__: None)


def small_model(seed: int = 3) -> LeapsTransformer:
    return LeapsTransformer(len(leaps.TOKENS), leaps.PROMPT_LEN + MAX_RESPONSE_LEN, seed=seed)


def requests(num: int) -> list[GenerateRequest]:
    prompts = [leaps.LeapsTokenizer().encode(problem.prompt) for problem in leaps.split_problems()[0][:num]]
    return [
        GenerateRequest(f"p{i}", np.array(prompt), SamplingSettings(MAX_RESPONSE_LEN, temperature=1.3), seed=100 + i)
        for i, prompt in enumerate(prompts)
    ]


def test_perfect_traces_are_right_and_any_other_answer_is_wrong() -> None:
    train, held_out = leaps.split_problems()
    for problem in [*train[::20], *held_out]:
        _, function, value, times, _ = problem.prompt.split()
        key = int(function[1:]), int(value), int(times[1:])
        response = leaps.perfect_response(*key)
        words = response.split()
        assert len(words) == 3 * key[2] + 3, "steps of three words, then # answer $"
        assert words[-6:-3] == ["j1", "k0", problem.ground_truth]
        text = leaps.LeapsTokenizer().decode(leaps.LeapsTokenizer().encode(response), skip_special_tokens=True)
        assert text == response.removesuffix(" $")
        assert leaps.grade(text, problem.ground_truth) == RewardResult(1.0, 1.0, problem.ground_truth)
        other = str((int(problem.ground_truth) + 1) % 10)
        assert leaps.grade(text, other) == RewardResult(0.0, 0.0, problem.ground_truth)


@pytest.mark.parametrize(
    ("response", "finish_reason", "accuracy", "answer"),
    [
        ("j4 k0 9 # 7", "stop", 1.0, "7"),  # the steps are not graded
        ("# 7", "stop", 1.0, "7"),
        ("# 7", "length", 0.0, None),  # cut off before its end
        ("# 3 # 7", "stop", 0.0, None),
        ("# 7 j1", "stop", 0.0, None),
        ("7", "stop", 0.0, None),
        ("#", "stop", 0.0, None),
        ("", "stop", 0.0, None),
    ],
)
def test_only_a_finished_single_answer_counts(
    response: str, finish_reason: str, accuracy: float, answer: str | None
) -> None:
    assert leaps.grade(response, "7", finish_reason=finish_reason) == RewardResult(accuracy, accuracy, answer)


def test_applications_compose() -> None:
    for function in range(leaps.NUM_FUNCTIONS):
        images = [leaps.apply(function, value, 1) for value in range(leaps.NUM_VALUES)]
        assert sorted(images) == list(range(leaps.NUM_VALUES))
        for value in range(leaps.NUM_VALUES):
            assert leaps.apply(function, value, 5) == leaps.apply(function, leaps.apply(function, value, 2), 3)


def test_held_out_problems_never_reach_training_or_warm_up() -> None:
    train, held_out = leaps.split_problems()
    held_out_prompts = {problem.prompt for problem in held_out}
    assert len(held_out_prompts) == leaps.NUM_HELD_OUT
    assert len({problem.prompt for problem in [*train, *held_out]}) == 9 * 80, "all there are, each once"
    source = leaps.training_source(train, seed=0)
    drawn = [source.next_problem() for _ in range(2 * len(train))]
    assert not held_out_prompts & {problem.prompt for problem in drawn}
    assert len({problem.uid for problem in drawn}) == len(drawn), "a second epoch has uids of its own"
    assert {problem.prompt for problem in drawn[: len(train)]} == {problem.prompt for problem in train}
    tokenizer = leaps.LeapsTokenizer()
    for token_ids, _ in leaps.warm_up_batches(train, num_batches=4, batch_size=64, seed=0):
        seen = {tokenizer.decode(row[: leaps.PROMPT_LEN].tolist()) for row in token_ids}
        assert not held_out_prompts & seen


def test_the_problem_order_depends_on_the_seed_alone() -> None:
    train, _ = leaps.split_problems()

    def first(seed: int) -> list[str]:
        source = leaps.training_source(train, seed)
        return [source.next_problem().uid for _ in range(50)]

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_sampled_logprobs_are_the_teacher_forced_ones() -> None:
    model = small_model()
    asked = requests(40)
    completions = LeapsEngine(model, end_id=leaps.ID_OF["$"]).generate(asked)
    reasons = {completion.finish_reason for completion in completions}
    assert reasons == {"stop", "length"}, "both ways to end are met"
    for request, completion in zip(asked, completions):
        ids = np.concatenate([request.prompt_ids, completion.token_ids])
        with torch.no_grad():
            rows = (model(torch.from_numpy(ids)[None])[0] / 1.3).log_softmax(-1)
        forced = rows[len(request.prompt_ids) - 1 : -1].gather(1, torch.from_numpy(completion.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(completion.logprobs, forced.numpy(), atol=2e-5)
        assert list(completion.token_ids).count(leaps.ID_OF["$"]) == (completion.finish_reason == "stop")


def test_a_response_depends_on_its_own_seed_and_not_on_its_neighbours() -> None:
    engine = LeapsEngine(small_model(), end_id=leaps.ID_OF["$"])
    together = engine.generate(requests(20))
    alone = engine.generate(requests(20)[7:8])[0]
    assert together[7].token_ids.tolist() == alone.token_ids.tolist()


def test_draws_follow_the_models_distribution() -> None:
    model = small_model()
    prompt = np.array(leaps.LeapsTokenizer().encode("^ F3 7 k16 ="))
    asked = [GenerateRequest(str(i), prompt, SamplingSettings(1), seed=i) for i in range(1500)]
    drawn = [completion.token_ids[0] for completion in LeapsEngine(model, end_id=0).generate(asked)]
    with torch.no_grad():
        expected = model(torch.from_numpy(prompt)[None])[0, -1].softmax(-1).numpy()
    found = np.bincount(drawn, minlength=len(leaps.TOKENS)) / len(drawn)
    assert np.abs(found - expected).max() < 4 * 0.5 / len(drawn) ** 0.5


@pytest.mark.parametrize("algorithm", study.ALGORITHMS)
def test_one_step_of_training_runs_and_changes_the_parameters(
    algorithm: str, tmp_path: Path, control: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[LeapsTransformer] = []
    monkeypatch.setattr(study, "LeapsActor", lambda model, lr: models.append(model) or LeapsActor(model, lr=lr))

    def half_right(responses: Sequence[str], truths: Sequence[str], extras: Sequence[Any]) -> list[RewardResult]:
        return [RewardResult(float(i % 2), float(i % 2), None) for i in range(len(responses))]

    start = study.warmed_up(0, TINY)
    result = study.run_once(0, algorithm, start, TINY, tmp_path / "run", grader=half_right, control=control)
    moved = [name for name, tensor in models[0].state_dict().items() if not torch.equal(tensor, start[name])]
    assert moved == list(start)
    assert [record["step"] for record in result["evaluations"]] == [0, 1]
    assert result["steps"]["num_samples"] == [16.0]
    first, second = result["updates"]
    assert first["ppo_kl"] == 0.0, "before the first update old and new log-probs are the same"
    assert second["ppo_kl"] != 0.0
    assert (second.get("influence_weights_mean", 1.0) > 1.0) == (algorithm == "fipo")
    assert json.loads(json.dumps(result)) == result


def test_the_update_is_the_products_loss_on_the_mean_over_tokens() -> None:
    """Two sequences of unequal length, ratio 1: the loss is -sum(A) / tokens and its gradient that of the log-probs."""
    model, sequences = small_model(), [make_sequence("# 7 $", 1.0), make_sequence("j1 k7 3 # 3 $", -0.5)]
    actor = LeapsActor(model, lr=0.0)
    old, _ = actor.old_logprobs([sequences])
    metrics = actor.update(
        sequences,
        old,
        algorithm="dapo",
        settings=LOSS_SETTINGS["dapo"],
        correction=CorrectionSettings(),
        reference_logprobs=[],
    )
    assert metrics["pg_loss"] == pytest.approx(-(3 * 1.0 - 6 * 0.5) / 9, abs=1e-7)
    assert metrics["num_kept"] == 9.0
    with pytest.raises(ValueError, match="plain losses alone"):
        actor.update(
            sequences,
            old,
            algorithm="dapo",
            settings=LOSS_SETTINGS["dapo"],
            correction=CorrectionSettings(use_tis=True),
            reference_logprobs=[],
        )


def make_sequence(response: str, advantage: float) -> TrainSequence:
    ids = np.array(leaps.LeapsTokenizer().encode(f"^ F3 7 k8 = {response}"))
    mask = (np.arange(len(ids)) >= leaps.PROMPT_LEN - 1) & (np.arange(len(ids)) < len(ids) - 1)
    return TrainSequence(
        uid=response,
        token_ids=ids,
        loss_mask=mask,
        advantages=np.where(mask, np.float32(advantage), np.float32(0)),
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        token_versions=np.where(mask, 0, -1),
    )


def test_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3, 6: mean 3, variance 14/3, standard error sqrt(14/12), t(0.975, 3) = 3.1824."""
    difference = paired_difference([11.0, 22.0, 33.0, 46.0], [10.0, 20.0, 30.0, 40.0])
    assert (difference.mean, difference.n) == (3.0, 4)
    assert difference.half_width == pytest.approx(3.1824 * 1.0801234, rel=1e-6)
    assert not difference.excludes_zero
    assert mean_estimate([1.0, 1.5]).half_width == pytest.approx(12.7062 * 0.25, rel=1e-6)
    assert paired_difference([1.0, 2.0, 3.1], [0.0, 1.0, 2.0]).excludes_zero
    with pytest.raises(ValueError, match="2 to 31 seeds"):
        mean_estimate([1.0])
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([1.0, 2.0], [1.0])


def test_the_report_pairs_runs_of_the_same_seed(tmp_path: Path) -> None:
    for seed, base in ((0, 0.2), (1, 0.6), (2, 0.4)):
        for algorithm, gain in (("grpo", 0.0), ("dapo", 0.1), ("fipo", 0.1)):
            if (seed, algorithm) != (2, "fipo"):  # not finished: the seed is left out
                write_result(tmp_path / "results", seed, algorithm, base, base + gain)
    results = read_results(tmp_path / "results")
    assert [run["seed"] for run in results["fipo"]] == [0, 1]
    text = "\n".join(report_lines(results))
    assert "| DAPO - GRPO | +0.000 [+0.000, +0.000] | +0.100 [+0.100, +0.100] |" in text
    assert "* Accuracy, FIPO - DAPO: +0.000 [+0.000, +0.000] at the last step (no difference" in text
    assert "* Accuracy, DAPO - GRPO: +0.100 [+0.100, +0.100] at the last step (a difference)" in text
    # a quarter and half of the tokens lie a quarter and half of the way between the two evaluations
    assert "| DAPO | 0.425 ± 2.541 | 0.450 ± 2.541 |" in text


def write_result(directory: Path, seed: int, algorithm: str, before: float, after: float) -> None:
    directory.mkdir(exist_ok=True)
    update = {"future_kl_abs_mean": 0.1, "influence_weights_mean": 1.01, "IW_upper_clip_ratio": 0.0}
    result = {
        "seed": seed,
        "algorithm": algorithm,
        "seconds": 10.0,
        "evaluations": [
            {"step": step, "accuracy": value, "response_length": 20.0} for step, value in ((0, before), (2, after))
        ],
        "steps": {key: [500.0, 500.0] for key in ("num_samples", "num_generated_samples", "num_generated_tokens")},
        "updates": [update, update],
    }
    (directory / f"seed-{seed}-{algorithm}.json").write_text(json.dumps(result))


def test_results_of_another_setup_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "seed-0-grpo.json"
    assert not study.is_done(path, TINY)
    path.write_text(json.dumps({"setup": {**study.asdict(TINY), "lr": 1.0}}))
    with pytest.raises(ValueError, match=r"was made with .*'lr': 1.0.* give another --output-dir"):
        study.is_done(path, TINY)
