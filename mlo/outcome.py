"""One evaluation of a problem's loss on one batch, and what it gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from mlo.errors import EvaluationError, LossError
from mlo.losses import checked_loss
from mlo.member import Member
from mlo.random_state import RandomState
from mlo.traced import Derivatives, Found


class Outcome(NamedTuple):
    """What one evaluation of a loss gave.

    Attributes:
        loss: a finite scalar; without a graph where `derivatives` are given.
        metrics: what is logged beside it.
        derivatives: those that were asked for.
        has_derivatives: whether the loss reaches any of the tensors of its gradient.

    """

    loss: Tensor
    metrics: dict[str, float]
    derivatives: Found | None
    has_derivatives: bool = True


def mean_derivatives(found: Sequence[Found]) -> Found:
    """Return the derivatives of the mean loss of several batches."""
    if len(found) == 1:
        return found[0]
    means: list[Tensor | None] = []
    for parts in zip(*found, strict=True):
        present = [t for t in parts if t is not None]
        means.append(sum(present[1:], start=present[0]) / len(parts) if present else None)
    return tuple(means)


def outcome(member: Member, batch: Any, *, checked: bool = True, compiled: Derivatives | None = None) -> Outcome:
    """Evaluate a problem's loss on one batch, with derivatives where they are to come from compiled code.

    Raises:
        EvaluationError: (if `checked`) it changed the batch in place.

    """
    versions = batch_versions(batch) if checked else None
    found: Found | None = None
    reached = True
    try:
        if compiled is None:
            result = member.problem.training_step(batch)
        else:
            result, found, reached = member.compiled_loss(batch, compiled)
    except AttributeError as error:
        _name_the_remedy(error, member)
        raise
    if checked and versions != batch_versions(batch):
        raise EvaluationError(
            f"{member.title} changed its batch in place; expected a loss that only reads it, since a batch is used "
            "again when the stage's response is differentiated. Use an out-of-place operation, or clone() first."
        )
    return interpreted(member, result, found, reached)


def interpreted(member: Member, result: Any, found: Found | None, reached: bool) -> Outcome:
    """Check what the loss has returned."""
    if isinstance(result, Tensor) or not isinstance(result, Mapping):
        return Outcome(checked_loss(result, member.title), {}, found, reached)
    if "loss" not in result:
        raise LossError(
            f"{member.title} returned a dict with {', '.join(map(repr, result)) or 'nothing'}; expected the key 'loss'."
        )
    metrics = {key: number(value, f"{member.title}, {key!r}") for key, value in result.items() if key != "loss"}
    return Outcome(checked_loss(result["loss"], member.title), metrics, found, reached)


def _name_the_remedy(error: AttributeError, member: Member) -> None:
    """Add to the error of who looks for a dependency among the problem's own attributes where to find it."""
    if error.obj is member.problem and error.name in member.problem.depends_on and hasattr(error, "add_note"):
        error.add_note(
            f"{error.name!r} is a dependency of problem {member.name!r}: it is read by self.deps.{error.name}."
        )


def replayed(
    member: Member, batch: Any, state: RandomState, *, checked: bool = True, compiled: Derivatives | None = None
) -> Outcome:
    """Evaluate a problem's loss with the random draws that begin at `state`."""
    state.restore()
    if not member.host_draws.unknown:
        return outcome(member, batch, checked=checked, compiled=compiled)
    before = member.host_draws.before()
    result = outcome(member, batch, checked=checked, compiled=compiled)
    member.host_draws.after(before)
    return result


def batch_versions(batch: Any) -> list[int]:
    """Return how often each tensor of a batch was written to."""
    versions = []
    # Most batches are a tuple or a list of tensors, for which going through a tree takes longest.
    for part in batch if isinstance(batch, tuple | list) else (batch,):
        if isinstance(part, Tensor):
            versions.append(part._version)
        else:
            versions += [t._version for t in pytree.tree_leaves(part) if isinstance(t, Tensor)]
    return versions


def number(value: object, what: str) -> float:
    """Return a logged value as a number."""
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise LossError(
            f"{what} returned {type(value).__name__}; expected a number or a tensor with one element to log."
        ) from None
