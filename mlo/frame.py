"""Frames: which tensors a problem's loss sees, and the places in which its modules look for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn

from mlo.errors import DependencyError
from mlo.vectors import Vector


class Parameters(dict[str, Tensor]):
    """Parameters by name: a read-only dict that says what there is when asked for what there is not."""

    __slots__ = ("_problem",)

    def __init__(self, problem: str, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
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

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by the constructor, since entries cannot be set."""
        return type(self), (self._problem, dict(self))

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


class ModuleSlots:
    """Where a module keeps its trainable parameters and its buffers.

    Attributes:
        places: the dicts and keys of the trainable parameters, each with its number; a tied one has several.
        recurrent: the parts that keep a second list of their weights beside the registered ones.
        has_buffers: whether there are any buffers.

    """

    def __init__(self, module: nn.Module, trainable: Sequence[nn.Parameter]) -> None:
        """Find the places of `trainable` and of all buffers."""
        index = {id(p): i for i, p in enumerate(trainable)}
        parts = list(module.modules())
        self.places: list[tuple[dict[str, Any], str, int]] = [
            (part._parameters, key, index[id(p)])
            for part in parts
            for key, p in part._parameters.items()
            if id(p) in index
        ]
        self._buffers: list[dict[str, Any]] = [part._buffers for part in parts if part._buffers]
        self.has_buffers = bool(self._buffers)
        self.recurrent = [part for part in parts if isinstance(part, nn.RNNBase)]

    def copy_buffers(self) -> list[Any]:
        """Let the module run with copies of its buffers; return what `restore_buffers` needs."""
        before = [dict(places) for places in self._buffers]
        for places in self._buffers:
            for key, buffer in places.items():
                if buffer is not None:
                    places[key] = buffer.clone()
        return before

    @property
    def buffers(self) -> list[Tensor]:
        """The buffers that the module runs with."""
        return [buffer for places in self._buffers for buffer in places.values() if buffer is not None]

    def restore_buffers(self, kept: list[Any]) -> None:
        """Undo `copy_buffers`."""
        for places, buffers in zip(self._buffers, kept, strict=True):
            places.clear()
            places.update(buffers)


class ParameterSlots:
    """The places of the trainable parameters of several modules, which are swapped at once.

    Swapping the entries of these places for the span of an evaluation covers everything that runs a
    module: calls of the whole, of a submodule, of a method, and the second forward pass of activation
    checkpointing.
    """

    __slots__ = ("_places", "_recurrent")

    def __init__(self, modules: Iterable[tuple[ModuleSlots, int]]) -> None:
        """Join the places of modules, whose parameters are counted from the number that is given with each."""
        given = list(modules)
        self._places = [(places, key, first + i) for slots, first in given for places, key, i in slots.places]
        self._recurrent = [part for slots, _ in given for part in slots.recurrent]

    def put(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Any]]:
        """Let the modules run with `tensors` in the place of their parameters; return what `restore` needs."""
        before = [places[key] for places, key, _ in self._places]  # all before one is written to: two may be the same
        for places, key, i in self._places:
            places[key] = tensors[i]
        if not self._recurrent:
            return before, []
        weights = [part._flat_weights for part in self._recurrent]
        for part in self._recurrent:
            part._flat_weights = [getattr(part, key) for key in part._flat_weights_names]
        return before, weights

    def restore(self, kept: tuple[list[Tensor], list[Any]]) -> None:
        """Undo `put`."""
        before, weights = kept
        for (places, key, _), tensor in zip(self._places, before, strict=True):
            places[key] = tensor
        for part, flat in zip(self._recurrent, weights, strict=True):
            part._flat_weights = flat


class Named(Protocol):
    """A problem whose parameters have names."""

    names: ParameterNames


class Frame:
    """The tensors that one evaluation of one problem's loss sees, by problem.

    Attributes:
        used: the dependencies that the loss has read.

    """

    __slots__ = ("_parameters", "_seen", "_values", "used")

    def __init__(
        self,
        values: Mapping[str, Vector],
        seen: Mapping[str, Named],
        parameters: dict[str, Parameters] | None = None,
    ) -> None:
        """Keep the trainable tensors of each problem, and what is known of its parameters otherwise.

        Frames over the same values may share the `parameters` that they have made.
        """
        self._values, self._seen = values, seen
        self._parameters: dict[str, Parameters] = {} if parameters is None else parameters
        self.used: set[str] = set()

    def parameters(self, problem: str) -> Parameters:
        """Return the parameters of a problem, in the order of its module."""
        found = self._parameters.get(problem)
        if found is None:
            names = self._seen[problem].names
            tensors = dict(zip(names.trainable, self._values[problem], strict=True))
            if names.constant:
                known = {**tensors, **names.constant}
                tensors = {n: known[n] for n in names.all}
            found = self._parameters[problem] = Parameters(problem, tensors)
        return found


class ParameterNames:
    """The names of a problem's parameters, and those that stay what they are in every evaluation."""

    __slots__ = ("all", "constant", "trainable")

    def __init__(self, named: Mapping[str, nn.Parameter], trainable: Sequence[str]) -> None:
        """Divide the parameters in trainable and constant ones."""
        self.all = tuple(named)
        self.trainable = tuple(trainable)
        kept = set(trainable)
        self.constant: dict[str, nn.Parameter] = {n: p for n, p in named.items() if n not in kept}
