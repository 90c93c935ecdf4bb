"""What the adapters of other libraries have in common."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mlo.bench.libraries.base import Library
from mlo.bench.libraries.functional import FunctionalView
from mlo.bench.specification import Method
from mlo.bench.stage import Case, Gradient, Stage, View


@contextmanager
def quietly() -> Iterator[None]:
    """Drop warnings, which are about the library's own use of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load(name: str) -> Any:
    """Import a module of a peer. Nothing is said about its types, so that it may be missing."""
    with quietly():
        return importlib.import_module(name)


class Peer(Library):
    """Another library, which may be missing."""

    #: What is imported, what is asked for its version, and how it is installed.
    module: ClassVar[str]
    distribution: ClassVar[str]
    install: ClassVar[str]
    #: The kinds of `Method` that it has.
    kinds: ClassVar[tuple[str, ...]]
    #: Whether it takes more than two levels.
    graphs: ClassVar[bool] = False

    def version(self) -> str:
        """Return the version that is installed."""
        return importlib.metadata.version(self.distribution)

    def unavailable(self) -> str | None:
        """Return why it cannot be imported, and how it is installed."""
        try:
            load(self.module)
        except Exception as error:  # whatever the import of a library may raise
            return f"{self.module} cannot be imported ({type(error).__name__}: {error}); install it by `{self.install}`"
        return None

    def refuses(self, case: Case, method: Method) -> str | None:
        """Return what it lacks."""
        if method.kind not in self.kinds:
            return f"{self.name} has no {method.kind}"
        if not self.graphs and not case.two_levels:
            return f"{self.name} is for two levels; more of them would be composed by hand"
        return None


class TwoLevels:
    """A case of two levels as functions of tuples of tensors: the weights w of the lower stage, x of the upper one.

    Attributes:
        weights: of the lower stage where hypergradients are taken.
        choice: x, leaves.

    """

    def __init__(self, case: Case, *, without_statistics: bool = False) -> None:
        """Build the modules; `torch.func` needs batch norms without running statistics, which training does not use."""
        self.lower, self.upper = case.stages
        self._below, self.above = self.lower.module(), self.upper.module()
        if without_statistics:
            torch.func.replace_all_batch_norm_modules_(self._below)
            torch.func.replace_all_batch_norm_modules_(self.above)
        self.names = [name for name, _ in self._below.named_parameters()]
        self._upper_names = [name for name, _ in self.above.named_parameters()]
        self.weights = tuple(p.detach().clone() for p in self._below.parameters())
        self.choice = tuple(p.detach().clone().requires_grad_() for p in self.above.parameters())

    def lower_loss(self, w: Sequence[Tensor], x: Sequence[Tensor]) -> Tensor:
        """Evaluate the lower loss on its first batch."""
        own = FunctionalView(self._below, dict(zip(self.names, w, strict=True)))
        return self.loss_of(self.lower, own, self.upper_view(x))

    def upper_loss(self, w: Sequence[Tensor], x: Sequence[Tensor]) -> Tensor:
        """Evaluate the upper loss on its first batch."""
        below = FunctionalView(self._below, dict(zip(self.names, w, strict=True)))
        return self.loss_of(self.upper, self.upper_view(x), below)

    def upper_view(self, x: Sequence[Tensor]) -> View:
        """Return the upper stage at x."""
        return FunctionalView(self.above, dict(zip(self._upper_names, x, strict=True)))

    @staticmethod
    def loss_of(stage: Stage, own: View, other: View, step: int = 0) -> Tensor:
        """Evaluate one stage's loss on the batch of one of its steps."""
        return stage.loss(own, dict.fromkeys(stage.reads, other), stage.batches[step % len(stage.batches)])

    def gradient(self, loss: Tensor) -> Gradient:
        """Return ∂loss/∂x by names."""
        return self.named(torch.autograd.grad(loss, self.choice, allow_unused=True, materialize_grads=True))

    def named(self, gradients: Sequence[Tensor]) -> Gradient:
        """Return gradients in x by names."""
        return dict(zip(self._upper_names, gradients, strict=True))


class PatchedView:
    """The view of a module whose parameters a library replaces from step to step."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """Keep the names, which are in the order of `model.parameters()`."""
        self._model, self._names = model, names

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The parameters of the last step by name."""
        return dict(zip(self._names, self._model.parameters(), strict=True))

    def __call__(self, *args: Any) -> Any:
        """Run the module."""
        return self._model(*args)
