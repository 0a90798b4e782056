"""Weights reach the engines of several nodes through each node's first rank, and every rank knows what failed where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nodes_on_ranks import take_turns
from processes import run_ranks
from tiny_models import save_model

UPDATE = ["release", "resume", "begin", "push"]  # the last as often as there are buckets
CLOSED = ["resume", "end"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory: Path = tmp_path_factory.mktemp("nodes")
    save_model(directory / "model", "qwen3", tied=False)
    return run_ranks(directory, 2, take_turns, {"model_dir": str(directory / "model")})


def calls_of(rank: dict[str, Any], name: str) -> list[str]:
    """What the rank's own engines were asked, repetitions in a row once."""
    calls = rank[name]["calls"]
    return [call for previous, call in zip(["", *calls], calls) if call != previous]


def test_engines_of_both_nodes_are_sent_the_same_weights_at_once(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        first = rank["first"]
        assert (first["state"], first["version"], first["failure"], first["held"]) == ("generating", 0, None, True)
        assert calls_of(rank, "first") == [*UPDATE, *CLOSED, "checksums"]
        assert first["calls"].count("push") > 3
    assert ranks[0]["first"]["failed"] == {}
    assert ranks[0]["first"]["addresses"] == {name: f"at {name}" for name in ("a0", "a1", "b0")}


def test_a_node_that_loses_its_engines_in_the_middle_leaves_the_others_serving(ranks: list[dict[str, Any]]) -> None:
    name = "one node loses all in the middle"
    for rank in ranks:
        assert (rank[name]["state"], rank[name]["version"], rank[name]["failure"]) == ("generating", 1, None)
    assert calls_of(ranks[0], name) == [*UPDATE, *CLOSED]
    assert calls_of(ranks[1], name) == UPDATE
    assert ranks[1][name]["calls"].count("push") == 1, "a stream goes on, but not into engines that failed"
    assert ranks[0][name]["failed"] == {"b0": "b0 died"}
    assert ranks[0][name]["held"]
    assert not ranks[1][name]["held"]


def test_what_failed_anywhere_is_started_again_where_it_runs(ranks: list[dict[str, Any]]) -> None:
    name = "both start again"
    for rank in ranks:
        assert (rank[name]["state"], rank[name]["version"], rank[name]["held"]) == ("generating", 2, True)
        assert calls_of(rank, name) == ["restart", "await restarted", *UPDATE, *CLOSED, "checksums"]
        assert rank["resynced"] == 2
    assert ranks[0][name]["failed"] == {}


def test_a_node_lost_for_good_is_set_aside_and_the_others_go_on(ranks: list[dict[str, Any]]) -> None:
    name = "one node is lost for good"
    for rank in ranks:
        assert (rank[name]["state"], rank[name]["version"], rank[name]["failure"]) == ("generating", 3, None)
    assert ranks[0][name]["failed"] == {"b0": "b0 is gone for good"}


def test_engines_lost_for_good_on_every_node_end_the_run_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    name = "all are lost for good"
    for rank in ranks:
        assert (rank[name]["state"], rank[name]["version"]) == ("failed", 3)
        assert rank[name]["failure"] == "NoEngineLeft: node 0 is gone for good\nnode 1 is gone for good"
        assert "failed -> training is no turn of the hybrid engine: node 0 is gone for good" in rank["refusal"]
