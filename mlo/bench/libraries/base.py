"""`Library`: what the benchmark asks of each library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from mlo.bench.specification import Method
from mlo.bench.stage import Case, Gradient


class Training(ABC):
    """A case in training."""

    @abstractmethod
    def step(self) -> None:
        """Make one step of the upper stage, and before it the steps of all stages that are stale."""

    @abstractmethod
    def metric(self) -> float:
        """Return `case.metric` of the present weights."""


class Library(ABC):
    """A library that computes hypergradients, or a way of doing it without one.

    A subclass imports the library inside its methods only, so that the benchmark runs where it is missing.
    """

    #: Its name on the command line and in records.
    name: ClassVar[str]
    #: Whether its work is done by this process's torch, where memory can be counted.
    countable: ClassVar[bool] = True
    #: Whether its reverse passes are runs of autograd's engine, which can be counted too.
    passes_countable: ClassVar[bool] = True

    @abstractmethod
    def version(self) -> str:
        """Return the version that is installed."""

    def unavailable(self) -> str | None:
        """Return why the library cannot be used here, and how that can be changed; `None` where it can."""
        return None

    def refuses(self, case: Case, method: Method) -> str | None:
        """Return why the library cannot do this, in a few words; `None` where it can."""
        return None

    @abstractmethod
    def hypergradient(self, case: Case, method: Method) -> Callable[[], Gradient]:
        """Return a function that computes the hypergradient of the upper stage.

        What can be prepared is prepared here. Each call computes the hypergradient at the weights that
        `stage.module` of each stage builds (for "unroll", at what its steps make of `stage.beginning()`, and it
        includes these steps), and leaves everything as it was. The result has detached tensors in the shapes of the
        upper stage's parameters, by their names; zeros where nothing reaches one.
        """

    def training(self, case: Case, method: Method) -> Training | None:
        """Return the case ready for training from `stage.beginning()`, or `None` if the library has no training."""
        return None
