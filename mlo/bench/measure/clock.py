"""Seconds: alternating runs in one process, medians with quartiles, ratios with confidence intervals."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

_RESAMPLES = 2000


@dataclass(frozen=True)
class Seconds:
    """Some runs in one number with its spread.

    Attributes:
        median: of all runs.
        low: the first quartile.
        high: the third.
        runs: how many.

    """

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Seconds:
        """Summarise the seconds of each run.

        >>> Seconds.of([3.0, 1.0, 2.0])
        Seconds(median=2.0, low=1.5, high=2.5, runs=3)

        """
        if len(times) == 1:
            return cls(times[0], times[0], times[0], 1)
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, low, high, len(times))

    def as_record(self) -> dict[str, float]:
        """Return what is stored."""
        return asdict(self)


def alternating(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float,
    device: torch.device,
    least: int = 3,
    settle: bool = False,
) -> dict[str, list[float]]:
    """Time functions in turn, in an order that is drawn anew for each round.

    Each is called once before, untimed. No garbage is collected within a timed call.

    Args:
        calls: the functions by name.
        rounds: how many times each is timed,
        seconds: unless its timed calls have taken that much; then it is left out of further rounds.
        device: its work is waited for before and after each call.
        least: how many times in any case.
        settle: make an untimed call of the same function before each timed one.

    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    names = list(calls)
    for call in calls.values():
        call()
    for done in range(rounds):
        if done >= least:
            names = [name for name in names if sum(times[name]) <= seconds]
        order.shuffle(names)
        for name in names:
            if settle:
                calls[name]()
            times[name].append(timed(calls[name], device))
    return times


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        _wait_for(device)
        began = time.perf_counter()
        call()
        _wait_for(device)
        return time.perf_counter() - began
    finally:
        if collecting:
            gc.enable()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of paired runs, with a 95 % confidence interval by the bootstrap."""

    median: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, times: Sequence[float], reference: Sequence[float]) -> Ratio:
        """Compare runs pair by pair, as many as both have.

        >>> Ratio.of([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
        Ratio(median=2.0, low=2.0, high=2.0, pairs=3)

        """
        ratios = torch.tensor([a / b for a, b in zip(times, reference, strict=False)], dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(ratios), (_RESAMPLES, len(ratios)), generator=generator)
        medians = ratios[drawn].quantile(0.5, dim=1)
        low, high = (float(medians.quantile(q)) for q in (0.025, 0.975))
        return cls(float(ratios.quantile(0.5)), low, high, len(ratios))

    def as_record(self) -> dict[str, float]:
        """Return what is stored."""
        return asdict(self)
