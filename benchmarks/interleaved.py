"""Ratios of two times that were measured in turn, so that a noisy machine is as noisy for both."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


# `time.process_time`, of one thread, tells more on a machine that is much busier with other work.
clock = time.perf_counter


class Ratio(NamedTuple):
    """Medians in seconds of both, and the median of the ratios of neighbours with the quartiles around it."""

    ours: float
    rival: float
    ratio: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of_pairs(cls, pairs: list[tuple[float, float]]) -> "Ratio":
        ratios = [ours / rival for ours, rival in pairs]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        ours, rival = (statistics.median(times) for times in zip(*pairs))
        return cls(ours, rival, statistics.median(ratios), low, high, len(pairs))

    def times(self, factor: float) -> "Ratio":
        """The ratio to `factor` times the rival."""
        scaled = (self.ratio / factor, self.low / factor, self.high / factor)
        return Ratio(self.ours, factor * self.rival, *scaled, self.repeats)


def seconds(run: Callable[[], object]) -> float:
    """Time of one call by `clock`, on a GPU until it is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def compare(ours: Callable[[], object], rival: Callable[[], object], repeats: int) -> Ratio:
    """Runs both once to warm up, then in turn, each first in every other pair."""
    ours(), rival()
    pairs = []
    for repeat in range(repeats):
        if repeat % 2:
            second, first = seconds(rival), seconds(ours)
        else:
            first, second = seconds(ours), seconds(rival)
        pairs.append((first, second))
    return Ratio.of_pairs(pairs)
