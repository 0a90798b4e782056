"""Whose turn it is: the states of the hybrid engine, and the one table of what may follow what."""

from __future__ import annotations

from typing import Literal

State = Literal["training", "syncing", "generating", "failed"]

TURNS: dict[State, tuple[State, ...]] = {
    "training": ("syncing", "failed"),
    "syncing": ("generating", "failed"),
    "generating": ("generating", "training", "syncing", "failed"),
    "failed": (),
}
"""state -> the states it may turn into. The first is "training": engines start with weights nobody vouches for, so a
sync comes before the first request. "generating" follows itself with every batch of requests, and "syncing" when
engines that were started again get the current weights, or when weights are sent before anything was trained."""


def next_state(state: State, wanted: State, reason: str = "") -> State:
    """`wanted`, which must be allowed after `state`. `reason`: why the hybrid engine has failed, if it has."""
    why = f": {reason}" if state == "failed" else ""
    assert wanted in TURNS[state], f"{state} -> {wanted} is no turn of the hybrid engine{why}"
    return wanted
