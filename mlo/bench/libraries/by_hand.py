"""Loops as one would write them by hand, without any library: as lean as PyTorch allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlo.bench.libraries.base import Library, Training
from mlo.bench.specification import SHIFT, Method
from mlo.bench.stage import Case, Gradient, ModuleView, Stage, View

Vector = list[Tensor]

_KINDS = ("fd", "identity", "neumann", "cg")


class Solved:
    """A stage with its module, and what its loss reads."""

    def __init__(self, stage: Stage, module: nn.Module) -> None:
        """Look up the parameters."""
        self.stage, self.module = stage, module
        self.view: View = ModuleView(module)
        self.own: Vector = list(self.view.params.values())
        self.others: dict[str, View] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self._next = 0

    def loss(self, batch: Any) -> Tensor:
        """Evaluate the loss."""
        return self.stage.loss(self.view, self.others, batch)

    def next_batch(self) -> Any:
        """Go to the next batch."""
        batch = self.stage.batches[self._next % len(self.stage.batches)]
        self._next += 1
        return batch


class Sweep:
    """The reverse sweep over stages none of which is nested: each is solved once, the highest first.

    Cost: one reverse pass for the upper loss, and for each stage two ("fd"), or one for the gradient's graph, one for
    each product, and one for the mixed product.
    """

    def __init__(self, case: Case, method: Method, modules: Mapping[str, nn.Module]) -> None:
        """Prepare the modules."""
        self.stages = {stage.name: Solved(stage, modules[stage.name]) for stage in case.stages}
        for solved in self.stages.values():
            solved.others = {name: self.stages[name].view for name in solved.stage.reads}
        self.upper = self.stages[case.upper.name]
        self._order = [self.stages[stage.name] for stage in reversed(case.lower)]
        self._position = {stage.name: i for i, stage in enumerate(case.stages)}
        self._method = method

    def hypergradient(self, batches: Mapping[str, Any]) -> Vector:
        """Return the hypergradient in the upper parameters."""
        upper = self.upper
        read = [name for name in upper.stage.reads if self._position[name] < self._position[upper.stage.name]]
        names = [upper.stage.name, *read]
        slopes = self._gradients(upper.loss(batches[upper.stage.name]), names)
        cotangents = dict(zip(names, slopes, strict=True))
        rule = _by_differences if self._method.kind == "fd" else self._by_products
        for solved in self._order:
            cotangent = cotangents.pop(solved.stage.name, None)
            if cotangent is None:
                continue
            reads = list(solved.stage.reads)
            inputs = [self.stages[name].own for name in reads]
            found = rule(solved, batches[solved.stage.name], cotangent, [t for own in inputs for t in own])
            for name, own in zip(reads, inputs, strict=True):
                change = found[: len(own)]
                found = found[len(own) :]
                before = cotangents.get(name)
                # Not in place: autograd may hand out one tensor as the gradient of two.
                cotangents[name] = change if before is None else list(torch._foreach_add(before, change))
        result = cotangents[upper.stage.name]
        assert result is not None
        return result

    def _gradients(self, loss: Tensor, names: Sequence[str]) -> list[Vector | None]:
        """Return the gradient in each stage's parameters by one reverse pass, `None` where the loss reaches none."""
        found = iter(torch.autograd.grad(loss, [t for n in names for t in self.stages[n].own], allow_unused=True))
        gradients: list[Vector | None] = []
        for name in names:
            own = self.stages[name].own
            reached = [next(found) for _ in own]
            if all(t is None for t in reached):
                gradients.append(None)
            else:
                pairs = zip(own, reached, strict=True)
                gradients.append([torch.zeros_like(p) if t is None else t for p, t in pairs])
        return gradients

    def _by_products(self, solved: Solved, batch: Any, cotangent: Vector, inputs: Vector) -> Vector:
        own = solved.own
        gradient = torch.autograd.grad(solved.loss(batch), own, create_graph=True)

        def product(vector: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(gradient, own, vector, retain_graph=True)

        adjoint = _solved(self._method, solved.stage.factor, cotangent, product)
        torch._foreach_neg_(adjoint)
        return list(torch.autograd.grad(gradient, inputs, adjoint, allow_unused=True, materialize_grads=True))


def _by_differences(solved: Solved, batch: Any, cotangent: Vector, inputs: Vector) -> Vector:
    """Shift the weights in place to both sides and back."""
    own, size = solved.own, torch.linalg.vector_norm(torch.stack(torch._foreach_norm(cotangent))).item()
    if size == 0:
        return [torch.zeros_like(t) for t in inputs]
    way = SHIFT / size
    for t in own:
        t.requires_grad_(False)
    try:
        torch._foreach_add_(own, cotangent, alpha=way)
        ahead = torch.autograd.grad(solved.loss(batch), inputs)
        torch._foreach_add_(own, cotangent, alpha=-2 * way)
        behind = torch.autograd.grad(solved.loss(batch), inputs)
        torch._foreach_add_(own, cotangent, alpha=way)
    finally:
        for t in own:
            t.requires_grad_(True)
    change = torch._foreach_sub(behind, ahead)
    torch._foreach_mul_(change, solved.stage.factor / (2 * way))
    return list(change)


def _solved(
    method: Method, factor: float, cotangent: Vector, product: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
) -> Vector:
    """Return λ ≈ H⁻¹ c."""
    if method.kind == "cg":
        return _conjugate_gradients(method.budget or 1, cotangent, product)
    step = torch._foreach_mul(cotangent, factor)
    adjoint = [t.clone() for t in step]
    for _ in range((method.budget or 1) - 1):
        torch._foreach_sub_(step, torch._foreach_mul(product(step), factor))
        torch._foreach_add_(adjoint, step)
    return adjoint


def _conjugate_gradients(
    steps: int, cotangent: Vector, product: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
) -> Vector:
    adjoint = [torch.zeros_like(t) for t in cotangent]
    residual, direction = [t.clone() for t in cotangent], [t.clone() for t in cotangent]
    error = _dot(residual, residual)
    for _ in range(steps):
        if error == 0:
            break
        curved = product(direction)
        curvature = _dot(direction, curved)
        if curvature == 0:  # the squares have left the range of the dtype
            break
        length = error / curvature
        torch._foreach_add_(adjoint, direction, alpha=length)
        torch._foreach_add_(residual, curved, alpha=-length)
        before, error = error, _dot(residual, residual)
        torch._foreach_mul_(direction, error / before)
        torch._foreach_add_(direction, residual)
    return adjoint


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(torch.vdot(s.reshape(-1), t.reshape(-1)) for s, t in zip(a, b, strict=True)).item()  # type: ignore[union-attr]


class ByHand(Library):
    """The loop that one would write for the problem at hand."""

    name = "by-hand"

    def version(self) -> str:
        """Return torch's version."""
        return torch.__version__

    def refuses(self, case: Case, method: Method) -> str | None:
        """Refuse nested problems, and what nobody writes by hand."""
        if case.nested:
            return "the sweep is for stages that are not nested"
        if method.kind not in _KINDS:
            return f"no loop for {method.kind} is written here"
        return None

    def hypergradient(self, case: Case, method: Method) -> Callable[[], Gradient]:
        """Return the reverse sweep."""
        sweep = Sweep(case, method, {stage.name: stage.module() for stage in case.stages})
        batches = {stage.name: stage.batches[0] for stage in case.stages}
        names = list(sweep.upper.view.params)
        return lambda: dict(zip(names, sweep.hypergradient(batches), strict=True))

    def training(self, case: Case, method: Method) -> Training:
        """Return the loop."""
        return LeanLoop(case, method)


class LeanLoop(Training):
    """A step of the upper stage after the steps of the lower ones, lowest first."""

    def __init__(self, case: Case, method: Method) -> None:
        """Build modules and optimizers."""
        self._case = case
        self.modules = {stage.name: stage.beginning() for stage in case.stages}
        self._sweep = Sweep(case, method, self.modules)
        self._names = [stage.name for stage in case.lower]
        for solved in self._sweep.stages.values():
            stage = solved.stage
            if stage.optimizer == "adam":
                solved.optimizer = torch.optim.Adam(solved.own, lr=stage.learning_rate)
            else:
                solved.optimizer = torch.optim.SGD(solved.own, lr=stage.learning_rate, momentum=stage.momentum)

    def step(self) -> None:
        """Train the stages, then the upper one."""
        batches = self.descend()
        upper = self._sweep.upper
        assert upper.optimizer is not None
        batches[upper.stage.name] = upper.next_batch()
        for parameter, gradient in zip(upper.own, self._sweep.hypergradient(batches), strict=True):
            parameter.grad = gradient
        upper.optimizer.step()

    def descend(self) -> dict[str, Any]:
        """Take the steps of each stage, and return the last batches."""
        return {name: _descend(self._sweep.stages[name]) for name in self._names}

    def metric(self) -> float:
        """Return `case.metric`."""
        return self._case.metric(self.modules)


def _descend(solved: Solved) -> Any:
    """Take the steps of a stage and return the last batch."""
    assert solved.optimizer is not None
    batch = None
    for _ in range(solved.stage.steps):
        batch = solved.next_batch()
        for parameter, gradient in zip(solved.own, torch.autograd.grad(solved.loss(batch), solved.own), strict=True):
            parameter.grad = gradient
        solved.optimizer.step()
    return batch
