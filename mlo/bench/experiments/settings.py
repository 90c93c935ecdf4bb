"""What a run is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mlo.bench.libraries.base import Library
from mlo.bench.problems.data import FASHION_FOLDER
from mlo.bench.problems.family import Family
from mlo.bench.records import Record
from mlo.bench.specification import Method
from mlo.bench.stage import Case

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Settings:
    """What a run is asked for; `None` leaves a choice to each experiment.

    Attributes:
        families: the problems by name.
        libraries: in the order of the tables.
        sizes: of problems.
        methods: the approximations.
        seeds: of the problems' data.
        threads: of torch; otherwise two where whole steps are compared, one else, since small tensors gain nothing.
        repetitions: timed runs of each case, at most.
        seconds: for the timed runs of one library on one case; then no more are begun.
        time_limit: a call that would take longer, by the growth so far, is left out.
        device: where all of it runs.
        dtype: the precision.
        data: the folder of Fashion-MNIST.
        quick: less of everything.

    """

    families: Mapping[str, Family]
    libraries: tuple[Library, ...]
    sizes: tuple[str, ...] | None = None
    methods: tuple[Method, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    threads: int | None = None
    repetitions: int | None = None
    seconds: float = 1.0
    time_limit: float = 60.0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    dtype: str | None = None
    data: Path = FASHION_FOLDER
    quick: bool = False

    def case(self, problem: str, size: str, seed: int, dtype: str) -> Case:
        """Build a case."""
        return self.families[problem].case(size, seed=seed, dtype=DTYPES[dtype], device=self.device, data=self.data)

    def chosen_sizes(self, problem: str, usual: tuple[str, ...]) -> tuple[str, ...]:
        """Return the sizes of a problem to run: those asked for, else the usual ones."""
        if problem not in self.families:
            return ()
        if self.sizes is None:
            return usual
        return tuple(size for size in self.families[problem].sizes if size in self.sizes)

    def chosen_methods(self, usual: tuple[str, ...]) -> tuple[Method, ...]:
        """Return the methods to run."""
        return tuple(map(Method.parse, usual)) if self.methods is None else self.methods


@dataclass(frozen=True)
class Task:
    """A part of an experiment.

    Attributes:
        head: the fields that all its records have; `experiment`, `problem` and `size` at least.
        run: yields the other fields of each.
        threads: of torch, unless the settings say otherwise.

    """

    head: Record
    run: Callable[[], Iterator[Record]]
    threads: int = 1

    @property
    def title(self) -> str:
        """Return what is being run, in a few words."""
        keys = ("experiment", "problem", "size", "method")
        return " ".join(str(self.head[key]) for key in keys if self.head.get(key) is not None)
