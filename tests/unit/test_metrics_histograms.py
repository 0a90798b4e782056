"""Histograms, settings and texts of a run in TensorBoard, and that metrics.jsonl stays small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from megatron_fipo.metrics import RunLogger, read_metrics
from megatron_fipo.metrics.histograms import MAX_BINS, Histogram, histogram_of

COUNTED = {"edges": [0.8, 0.9, 1.0, 1.2], "counts": [0, 3, 5]}


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests about curves.png wait for it to be drawn."""
    if "curves" not in request.node.name:
        monkeypatch.setattr("megatron_fipo.metrics.run_logger.draw_curves", lambda *_, **__: None)


def step_metrics(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "accuracy": 0.5,
        "histograms": {"response_length": [1, 2, 2, 9], "reward": np.array([-1.0, 1.0]), "advantage": []},
        "updates": [{"pg_loss": 0.1, "influence_weights_histogram": COUNTED}] * 2,
    }


def events(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), size_guidance={"histograms": 0, "tensors": 0}).Reload()


def test_raw_values_fall_into_bins_of_equal_width() -> None:
    assert histogram_of("x", [1, 2, 2, 9]) == Histogram(
        edges=(1.0, 1 + 8 / 3, 1 + 16 / 3, 9.0), counts=(3.0, 0.0, 1.0), total=14.0, total_of_squares=90.0
    )
    many = histogram_of("x", np.linspace(0, 1, 10_000))
    assert many is not None
    assert len(many.counts) == MAX_BINS == len(many.edges) - 1
    assert sum(many.counts) == 10_000
    outlier = histogram_of("x", [0.0] * 10_000 + [1e-9, 1e9])  # NumPy's own choices of bins fill the memory here
    assert outlier is not None
    assert sum(outlier.counts) == 10_002


def test_one_value_and_none() -> None:
    constant = histogram_of("x", [3.0] * 5)
    assert constant == Histogram(edges=(2.5, 3.5), counts=(5.0,), total=15.0, total_of_squares=45.0)
    assert histogram_of("x", []) is None
    assert histogram_of("x", {"edges": [0, 1], "counts": [0]}) is None


def test_values_that_rounding_alone_tells_apart_share_a_bin() -> None:
    sums = histogram_of("x", [0.3, 0.1 + 0.2, 0.3])  # a reward that adds up its parts in two orders
    assert sums is not None
    assert (sums.edges, sums.counts) == ((0.3, 0.1 + 0.2), (3.0,))
    huge = histogram_of("x", [1e17] * 5)
    assert huge is not None
    assert huge.counts == (5.0,)
    assert huge.edges[0] < 1e17 < huge.edges[1]


def test_counts_are_taken_as_they_are() -> None:
    found = histogram_of("x", COUNTED)
    assert found is not None
    assert (found.edges, found.counts) == ((0.8, 0.9, 1.0, 1.2), (0.0, 3.0, 5.0))
    assert found.total == pytest.approx(3 * 0.95 + 5 * 1.1)
    assert found.total_of_squares == pytest.approx(3 * 0.95**2 + 5 * 1.1**2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, float("nan")], "histogram 'x' holds nan, but must hold finite numbers"),
        ({"edges": [0, 1]}, r"histogram 'x' holds \['edges'\], but must hold edges and counts"),
        ({"edges": [0, 1], "counts": [1, 2]}, "2 edges and 2 counts, but must have one more"),
        ({"edges": [0, 1, 1], "counts": [1, 2]}, "must have rising, finite edges"),
        ({"edges": [0, float("inf")], "counts": [1]}, "must have rising, finite edges"),
    ],
)
def test_what_is_no_histogram_is_refused_by_name(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        histogram_of("x", values)


def test_histograms_go_to_tensorboard_and_raw_ones_nowhere_else(tmp_path: Path) -> None:
    with RunLogger(tmp_path, total_steps=2) as logger:
        for step in (1, 2):
            logger.log_step(step_metrics(step))
    steps, updates = events(tmp_path / "tensorboard"), events(tmp_path / "tensorboard/updates")
    assert steps.Tags()["histograms"] == ["histograms/response_length", "histograms/reward"]
    lengths = steps.Histograms("histograms/response_length")
    assert [event.step for event in lengths] == [1, 2]
    value = lengths[0].histogram_value
    assert (value.min, value.max, value.num, value.sum, value.sum_squares) == (1, 9, 4, 14, 90)
    assert list(value.bucket) == [3, 0, 1]
    weights = updates.Histograms("histograms/influence_weights")
    assert [event.step for event in weights] == [1, 2, 3, 4]
    assert list(weights[0].histogram_value.bucket_limit) == [0.9, 1.0, 1.2]
    record = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert "histograms" not in record
    assert record["updates"][0]["influence_weights_histogram"] == COUNTED


def test_the_settings_are_written_down_and_shown(tmp_path: Path) -> None:
    config = {"algorithm": "fipo", "loss.half_life": 32.0, "run.save": None, "data.eval_prompt_data": ["a", "b"]}
    for resume_step, half_life in ((None, 32.0), (1, 64.0)):
        config["loss.half_life"] = half_life
        with RunLogger(
            tmp_path, total_steps=2, resume_step=resume_step, config=config, config_text="loss.half_life  32.0  preset"
        ) as logger:
            logger.log_step(step_metrics((resume_step or 0) + 1))
        assert json.loads((tmp_path / "config.json").read_text()) == config
    found = events(tmp_path / "tensorboard")
    assert b"    loss.half_life  32.0  preset" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= found.summary_metadata.keys()
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["algorithm"].string_value == "fipo"
    assert shown["loss.half_life"].number_value in (32.0, 64.0)
    assert shown["run.save"].string_value == "null"
    assert shown["data.eval_prompt_data"].string_value == '["a", "b"]'


def test_without_settings_no_file_of_them_is_written(tmp_path: Path) -> None:
    with RunLogger(tmp_path, total_steps=1):
        pass
    assert not (tmp_path / "config.json").exists()


def test_curves_take_every_data_set_of_the_evaluation(tmp_path: Path) -> None:
    with RunLogger(tmp_path, total_steps=1) as logger:
        for step in (0, 1):
            scores = {f"aime24/{kind}@{k}": 0.1 * step for kind in ("avg", "cons", "pass") for k in (1, 32)}
            logger.log_evaluation(step, {"accuracy": 0.1, **scores, "math/500/avg@4": 0.5})
            if step:
                logger.log_step(step_metrics(step) | {"noise_gauge": 0.0, "response_length/mean": 0.0})
    assert (tmp_path / "curves.png").stat().st_size > 20_000
