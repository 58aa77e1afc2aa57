"""Times of several calls, interleaved in one process so that a noisy machine is noisy for all of them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int, pause: float = 0.0) -> dict[str, dict[str, float]]:
    """Seconds of each call: the first one (compilation included), then minimum and median of `repeats` in turn.

    `pause` seconds pass before each call: on a CPU the threads of a factorisation spin for a while after it, and would
    take a core from whichever call comes next.
    """
    first = {name: seconds(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if pause:
                time.sleep(pause)
            times[name].append(seconds(call))
    return {
        name: {"first": first[name], "min": min(times[name]), "median": statistics.median(times[name])}
        for name in calls
    }


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds until everything that the call returns is there."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin
