"""Times rivals in turns; medians and ratios of their times."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

MIN_BURST = 1e-3  # seconds of calls timed at once, so long that jitter does not matter
MIN_ROUNDS, MAX_ROUNDS = 7, 61

Key = TypeVar("Key", bound=Hashable)
Step = Callable[[], object]


class Timing(NamedTuple):
    seconds: float  # the median of one call
    ratio: float  # over the median of the baseline
    iqr: float  # interquartile range of the ratios of the single rounds


def burst(step: Step, calls: int) -> float:
    """The time of this many calls in a row, in seconds."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - start


def take_turns(
    steps: dict[Key, Step],
    baseline: Key,
    budget: float,
    burst: Callable[[Step, int], float] = burst,
) -> dict[Key, Timing]:
    """Times all steps in interleaved rounds for about ``budget`` seconds; ``burst`` times a number
    of calls of a step.

    Each round times one burst of each step, with the same number of calls. The order changes from
    round to round, so that no step always follows the same other.
    """
    for step in steps.values():
        step()
    calls = 1
    while burst(steps[baseline], calls) < MIN_BURST:
        calls *= 2
    keys = list(steps)

    def time_round(order: list[Key]) -> dict[Key, float]:
        return {key: burst(steps[key], calls) / calls for key in order}

    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        time_round(keys)  # the warm-up
        round_seconds = time.perf_counter() - start
        num_rounds = min(max(int(budget / round_seconds), MIN_ROUNDS), MAX_ROUNDS)
        rounds = []
        for index in range(num_rounds):
            shift = index % len(keys)
            order = keys[shift:] + keys[:shift]
            rounds.append(time_round(order if index % 2 == 0 else order[::-1]))
    finally:
        gc.enable()

    medians = {key: statistics.median(taken[key] for taken in rounds) for key in keys}
    timings = {}
    for key in keys:
        ratios = [taken[key] / taken[baseline] for taken in rounds]
        lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        timings[key] = Timing(medians[key], medians[key] / medians[baseline], upper - lower)
    return timings
