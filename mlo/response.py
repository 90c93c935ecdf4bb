"""A solved stage as one autograd node: `best_response`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlo.ambient import Autocast
from mlo.autograd_graph import no_second_derivative, reject_first_order_operations
from mlo.errors import ConfigurationError, MloError
from mlo.hypergradient import HypergradientMethod
from mlo.hypergradient.scaling import missing_learning_rate
from mlo.losses import checked_loss
from mlo.random_state import Preserved, RandomState
from mlo.stage_function import LossHere, StageFunction
from mlo.status import SolveReport
from mlo.vectors import Vector

Tree = TypeVar("Tree")

# How torch says that an operation, or what torch.compile has made of several, has no second derivative, in reverse or
# in forward mode.
_MISSING_DERIVATIVE = (
    "is not implemented",
    "once_differentiable",
    "forward AD",
    "forward mode AD",
    "donated buffer",
    "support double backward",
)


@dataclass(frozen=True)
class _Node:
    stage: StageFunction
    method: HypergradientMethod
    size: int


def respond(
    stage: StageFunction, method: HypergradientMethod, solution: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Vector:
    """Return `solution` as a function of `inputs`, with the method's backward rule.

    The result shares storage with `solution`; writing to it in place raises an error. It is constant where
    no input needs a gradient, or where the method carries none.
    """
    given = tuple(t.detach() for t in solution)
    if not method.carries_gradient or not any(t.requires_grad for t in inputs):
        return given
    node = _Node(stage, method, len(given))
    return _BestResponse.apply(node, *given, *inputs)  # type: ignore[no-any-return, no-untyped-call]


class _BestResponse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, node: _Node, *tensors: Tensor) -> Vector:
        # Views, so that autograd refuses writing to a response in place before it reaches the parameter.
        solution = tuple(t.view_as(t) for t in tensors[: node.size])
        ctx.node = node
        # The *output* is kept: a second derivative flows through θ* itself too.
        ctx.save_for_backward(*solution, *tensors[node.size :])
        ctx.set_materialize_grads(False)
        return solution

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        node: _Node = ctx.node
        saved: Vector = ctx.saved_tensors
        solution, inputs = saved[: node.size], saved[node.size :]
        needed = ctx.needs_input_grad[1 + node.size :]
        result = pulled_back(node.stage, node.method, cotangents, solution, inputs, needed)
        return None, *(None,) * node.size, *result


def pulled_back(
    stage: StageFunction,
    method: HypergradientMethod,
    cotangents: Sequence[Tensor | None],
    solution: Sequence[Tensor],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the cotangents of `inputs` for those of `solution`, where they are `needed`, else `None`.

    Raises:
        ConfigurationError: the method returns anything else than a tensor of an input's shape, or `None`, for each.
        EvaluationError: the loss has no second derivative, and the method needs it.

    """
    given = tuple(
        [
            torch.zeros_like(t) if c is None else c.to_dense() if c.is_sparse else c
            for c, t in zip(cotangents, solution, strict=True)
        ]
    )
    try:
        result = method.pullback(stage, given, solution, inputs, needed)
    except RuntimeError as error:
        if not isinstance(error, MloError) and any(text in str(error) for text in _MISSING_DERIVATIVE):
            kind = type(method).__name__
            raise no_second_derivative(stage.title, kind, str(error).partition("\n")[0]) from error
        raise
    checked = _checked(result, inputs, needed)
    if checked is None:
        raise ConfigurationError(
            f"{type(method).__name__}.pullback at stage {stage.name!r}: expected for each input a tensor of its shape, "
            f"or None, that is {[tuple(x.shape) for x in inputs]}; got "
            f"{[None if r is None else tuple(r.shape) for r in result]}."
        )
    return checked


def _checked(
    result: Sequence[Tensor | None], inputs: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, ...] | None:
    """Return what is needed of a method's result; `None` if it does not fit the inputs."""
    if len(result) != len(inputs):
        return None
    kept: list[Tensor | None] = []
    for r, x, wanted in zip(result, inputs, needed, strict=True):
        if wanted and r is not None and r.shape != x.shape:
            return None
        kept.append(r if wanted else None)
    return tuple(kept)


class _FunctionalStage(StageFunction):
    """A stage that is a plain function of two trees of tensors."""

    name = "best_response"
    title = "the loss given to best_response"
    reports_solves = False

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        solution_structure: pytree.TreeSpec,
        input_structure: pytree.TreeSpec,
        tensors: Sequence[Tensor],
        size: int,
        warm_starts: MutableMapping[str, Vector] | None,
        method: HypergradientMethod,
    ) -> None:
        self._loss, self._method = loss, method
        self._inspected = False
        self._structures = solution_structure, input_structure
        self._devices = tuple(dict.fromkeys(t.device for t in tensors))
        self._random = RandomState.capture(self._devices)
        self._autocast = Autocast.capture(dict.fromkeys(d.type for d in self._devices))
        self.learning_rates = None
        self.weight_decays = (0.0,) * size
        self.signs = (1.0,) * size
        self.warm_starts = warm_starts

    @contextmanager
    def evaluation(self, solution: Sequence[Tensor], inputs: Sequence[Tensor]) -> Iterator[LossHere]:
        arguments = tuple(
            pytree.tree_unflatten(list(t), s) for t, s in zip((solution, inputs), self._structures, strict=True)
        )
        with Preserved(self._devices), self._autocast.restored():
            yield _FunctionHere(self, arguments)

    def evaluate(self, *arguments: Any) -> Tensor:
        """Return the loss, with the random draws of the call."""
        self._random.restore()
        loss = checked_loss(self._loss(*arguments), self.title)
        if self._method.needs_second_derivatives and not self._inspected:
            self._inspected = True
            reject_first_order_operations(loss, self.title, type(self._method).__name__)
        return loss

    def record(self, report: SolveReport) -> None:
        pass


class _FunctionHere(LossHere):
    def __init__(self, stage: _FunctionalStage, arguments: tuple[Any, ...]) -> None:
        self._stage, self._arguments = stage, arguments

    def __call__(self) -> Tensor:
        return self._stage.evaluate(*self._arguments)


def best_response(
    loss: Callable[[Any, Any], Tensor],
    solution: Tree,
    dependencies: Any,
    method: HypergradientMethod,
    *,
    warm_starts: MutableMapping[str, Vector] | None = None,
) -> Tree:
    """Return `solution` as a differentiable function of `dependencies`: θ*(x) = argmin over θ of loss(θ, x).

    The value is `solution`, which is taken to minimise the loss. A gradient c that reaches it is passed on
    as −Gᵀ H⁻ᵀ c with H = ∂²loss/∂θ² and G = ∂²loss/∂θ∂x (the implicit function theorem), computed or
    approximated by `method`. The result can be differentiated any number of times where the method can.

    Args:
        loss: `loss(solution, dependencies)` → scalar tensor. It is evaluated again in the backward pass, with
            the random state and the autocast settings of this call. What it takes from elsewhere than its two
            arguments is a constant.
        solution: θ*, a tensor or a nested tuple, list or dict of tensors.
        dependencies: x, likewise.
        method: a hypergradient method, e.g. `mlo.ConjugateGradient()`.
        warm_starts: a dictionary that outlives the call, in which a method with `warm_start=True` keeps its
            solution for the next one.

    Returns:
        The same structure as `solution`, sharing its storage.

    Raises:
        ConfigurationError: an argument is of a wrong kind, or the method needs what only an engine has.
        LossError: (in the backward pass) the loss is not a finite scalar with a graph.

    Cost: nothing in the forward pass; in the backward pass that of the method.

    >>> import mlo, torch
    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> w = mlo.best_response(lambda w, x: (w - x**2) ** 2, torch.tensor(9.0), x, mlo.ConjugateGradient())
    >>> torch.autograd.grad(w, x)[0].item()
    6.0

    """
    if not callable(loss):
        raise ConfigurationError(
            f"best_response(loss={loss!r}): expected a function of the solution and the dependencies."
        )
    if not isinstance(method, HypergradientMethod):
        raise ConfigurationError(
            f"best_response(method={method!r}): expected a hypergradient method such as mlo.ConjugateGradient()."
        )
    thetas, solution_structure = _flattened("solution", solution)
    inputs, input_structure = _flattened("dependencies", dependencies)
    if method.needs_learning_rate:
        raise missing_learning_rate(method, _FunctionalStage.name)
    if method.recorded_steps(1) or method.needs_update_derivative:
        raise ConfigurationError(
            f"best_response(method={type(method).__name__}(...)): it differentiates through optimizer steps, which "
            "only an engine takes. Use mlo.Engine, or an implicit method."
        )
    if method.keeps_solutions and warm_starts is None:
        raise ConfigurationError(
            f"best_response(method={method!r}): a warm start needs a place that outlives the call; pass "
            "warm_starts= with one dictionary that you keep."
        )
    if warm_starts is not None and not isinstance(warm_starts, MutableMapping):
        raise ConfigurationError(
            f"best_response(warm_starts={warm_starts!r}): expected a dictionary that you keep from call to call, "
            "one for each stage."
        )
    stage = _FunctionalStage(
        loss, solution_structure, input_structure, (*thetas, *inputs), len(thetas), warm_starts, method
    )
    result = respond(stage, method, thetas, inputs)
    return pytree.tree_unflatten(list(result), solution_structure)  # type: ignore[no-any-return]


def _flattened(what: str, tree: Any) -> tuple[Vector, pytree.TreeSpec]:
    tensors, structure = pytree.tree_flatten(tree)
    wrong = [t for t in tensors if not isinstance(t, Tensor)]
    if wrong or not tensors:
        got = repr(wrong[0]) if wrong else "nothing"
        raise ConfigurationError(
            f"best_response({what}=…): expected a tensor or a nested tuple, list or dict of tensors, got {got}."
        )
    if what == "solution" and not all(t.is_floating_point() for t in tensors):
        raise ConfigurationError("best_response(solution=…): expected real floating-point tensors.")
    return tuple(tensors), structure
