"""Binding: which tensors a problem's loss sees, for the span of one evaluation and its backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn

from mlo.errors import DependencyError, EvaluationError


class Parameters(dict[str, Tensor]):
    """Parameters by name: a read-only dict that says what there is when asked for what there is not."""

    def __init__(self, problem: str, tensors: Mapping[str, Tensor]) -> None:
        """Take a copy of the mapping; `problem` is named in errors."""
        super().__init__(tensors)
        self._problem = problem

    def __missing__(self, name: str) -> NoReturn:
        """Raise the error for an unknown name."""
        raise DependencyError(f"problem {self._problem!r} has no parameter {name!r}; it has {', '.join(self)}.")

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise DependencyError(
            f"the parameters of problem {self._problem!r} are a read-only view; change them in the module, between "
            "steps of the engine."
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


class ModuleSlots:
    """Where a module keeps its trainable parameters and its buffers.

    Swapping the entries of these places for the span of an evaluation covers everything that runs the
    module: calls of the whole, of a submodule, of a method, and the second forward pass of activation
    checkpointing. A tied parameter has several places.
    """

    def __init__(self, module: nn.Module, trainable: Sequence[nn.Parameter]) -> None:
        """Find the places of `trainable` and of all buffers."""
        index = {id(p): i for i, p in enumerate(trainable)}
        parts = list(module.modules())
        self._places: list[tuple[dict[str, Any], str, int]] = [
            (part._parameters, key, index[id(p)])
            for part in parts
            for key, p in part._parameters.items()
            if id(p) in index
        ]
        self._buffers: list[tuple[dict[str, Any], str]] = [
            (part._buffers, key) for part in parts for key, b in part._buffers.items() if b is not None
        ]
        # Recurrent layers keep a second list of their weights beside the registered ones.
        self._recurrent = [part for part in parts if isinstance(part, nn.RNNBase)]

    @contextmanager
    def hold(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Let the module run with `tensors` in the place of its trainable parameters."""
        before = [places[key] for places, key, _ in self._places]
        weights = [part._flat_weights for part in self._recurrent]
        try:
            for places, key, i in self._places:
                places[key] = tensors[i]
            for part in self._recurrent:
                part._flat_weights = [getattr(part, key) for key in part._flat_weights_names]
            yield
        finally:
            for (places, key, _), kept in zip(self._places, before, strict=True):
                places[key] = kept
            for part, kept in zip(self._recurrent, weights, strict=True):
                part._flat_weights = kept

    @contextmanager
    def spare_buffers(self) -> Iterator[None]:
        """Let the module run with copies of its buffers, so that its own do not change."""
        before = [places[key] for places, key in self._buffers]
        try:
            for (places, key), kept in zip(self._buffers, before, strict=True):
                places[key] = None if kept is None else kept.clone()
            yield
        finally:
            for (places, key), kept in zip(self._buffers, before, strict=True):
                places[key] = kept


class Frame:
    """The tensors that one evaluation of one problem's loss sees, by problem."""

    def __init__(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep the tensors of each problem that may be read."""
        self._tensors = tensors
        self._parameters: dict[str, Parameters] = {}
        self.used: set[str] = set()

    def parameters(self, problem: str) -> Parameters:
        """Return the parameters of a problem."""
        found = self._parameters.get(problem)
        if found is None:
            found = self._parameters[problem] = Parameters(problem, self._tensors[problem])
        return found

    def note_use(self, problem: str) -> None:
        """Take note that the loss reads a dependency."""
        self.used.add(problem)


@contextmanager
def unchanged_in_place(tensors: Mapping[str, Mapping[str, Tensor]], reader: str) -> Iterator[None]:
    """Raise an error if a block writes to one of the tensors in place.

    Autograd refuses such writes to what needs a gradient; this finds those to constants and those under
    `torch.no_grad()`.
    """
    versions = [t._version for named in tensors.values() for t in named.values()]
    yield
    after = ((owner, name, t._version) for owner, named in tensors.items() for name, t in named.items())
    for (owner, name, version), before in zip(after, versions, strict=True):
        if version != before:
            raise EvaluationError(
                f"the loss of problem {reader!r} changed the parameter {name!r} of problem {owner!r} in place; "
                "expected a loss that only reads parameters. Use an out-of-place operation, or clone() first."
            )
