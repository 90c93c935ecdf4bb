"""One optimizer step of one problem, which leaves everything as it was if it fails."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mlo import bare_step
from mlo.errors import LossError
from mlo.member import Member
from mlo.memory import separate_gradients
from mlo.total_gradient import TotalGradient
from mlo.vectors import norm


def take_step(
    member: Member, gradient: Callable[[], TotalGradient], before_step: Callable[[TotalGradient], None] | None
) -> tuple[TotalGradient, float]:
    """Let the problem's optimizer take one step; return the evaluation behind it and the gradient's norm.

    `gradient` puts the total gradient into `.grad` of the problem's parameters. Before, `.grad` of everything that the
    optimizer holds is cleared: one left over from a time at which a parameter was not frozen would move it. An
    exception in `gradient` or in `before_step`, which is called with what it has found, or a gradient that is not
    finite, leaves parameters and `.grad` as they were.
    """
    optimizer, held = member.problem.optimizer, member.held
    assert optimizer is not None
    before = [p.grad for p in held]
    try:
        if isinstance(optimizer, torch.optim.LBFGS):
            return _step_with_closure(member, gradient)
        total, size = _evaluate(member, gradient)
        if before_step is not None:
            before_step(total)
    except BaseException:
        for p, grad in zip(held, before, strict=True):
            p.grad = grad
        raise
    before.clear()
    bare_step.take(optimizer)
    return total, size


def _evaluate(member: Member, gradient: Callable[[], TotalGradient]) -> tuple[TotalGradient, float]:
    for p in member.held:
        p.grad = None
    total = gradient()
    return total, _clipped_norm(member)


def _step_with_closure(member: Member, gradient: Callable[[], TotalGradient]) -> tuple[TotalGradient, float]:
    """Take a step of an optimizer that evaluates the loss several times, the first time before it moves."""
    optimizer = member.problem.optimizer
    assert optimizer is not None
    parameters = [p.detach().clone() for p in member.trainable]
    state = copy.deepcopy(optimizer.state_dict())
    first: list[tuple[TotalGradient, float]] = []

    def closure() -> float:
        result = _evaluate(member, gradient)
        first.append(result)
        return result[0].loss

    try:
        optimizer.step(closure)
    except BaseException:
        with torch.no_grad():
            for p, kept in zip(member.trainable, parameters, strict=True):
                p.copy_(kept)
        optimizer.load_state_dict(state)
        raise
    return first[0]


def step_scheduler(scheduler: Any) -> None:
    """Step a learning-rate scheduler after an optimizer step, if it does not wait for a validation."""
    if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step()


def _clipped_norm(member: Member) -> float:
    """Return the norm of the gradient, and clip the gradient if the problem wants it."""
    limit, parameters = member.problem.grad_clip, member.trainable
    size = norm([p.grad for p in parameters if p.grad is not None])
    if not math.isfinite(size):
        bad = [
            n
            for n, p in zip(member.names.trainable, parameters, strict=True)
            if p.grad is not None and not math.isfinite(norm([p.grad]))
        ]
        raise LossError(
            f"problem {member.name!r}: the gradient of its loss is not finite in the parameters {', '.join(bad)} while "
            "the loss is; expected finite numbers, and no step was taken. Lower the learning rates if the losses "
            "have been growing; look for square roots, logarithms or quotients at 0 in the loss, and at the solver "
            "reports of the stages below."
        )
    if limit is not None:
        separate_gradients(parameters)  # which are scaled in place
        nn.utils.clip_grad_norm_(parameters, limit)
    return size
