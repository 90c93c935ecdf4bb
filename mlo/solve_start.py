"""What happens when a stage begins to be solved: starting over, and recording the steps that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mlo.errors import ConfigurationError
from mlo.graph import ProblemGraph
from mlo.links import Links
from mlo.member import Member
from mlo.optimizer_steps import differentiable_step
from mlo.recording import Recording

Members = Mapping[str, Member]


def start_over(member: Member, members: Members) -> None:
    """Put a stage that starts over at its beginning: the parameters that it starts from, and a fresh optimizer."""
    origin, optimizer = _origin(member, members), member.problem.optimizer
    if origin is None or optimizer is None:
        return
    with torch.no_grad():
        for name, p in zip(member.names.trainable, member.trainable, strict=True):
            p.copy_(origin.parameters[name])
    optimizer.state.clear()


def begin_recording(links: Links, members: Members, member: Member, remaining: int) -> None:
    """Begin to record the steps of a solve if the next one, of `remaining`, is the first that the method wants."""
    length = links.method.recorded_steps(member.problem.steps)
    if remaining != length:
        return
    member.recording = Recording(
        length=length,
        every=links.method.kept_every(length),
        inputs=tuple(t.detach().clone() for m in links.inputs for t in m.trainable),
        origins=_positions_of_origins(member, members, links.inputs),
    )


def _positions_of_origins(member: Member, members: Members, inputs: Sequence[Member]) -> tuple[int | None, ...]:
    """Return for each parameter of a stage the position among its inputs of the tensor that it starts from."""
    origin = _origin(member, members)
    if origin is None:
        return (None,) * len(member.trainable)
    before = sum(len(m.trainable) for m in inputs[: inputs.index(origin)])
    position = {n: before + i for i, n in enumerate(origin.names.trainable)}
    return tuple(position.get(n) for n in member.names.trainable)


def _origin(member: Member, members: Members) -> Member | None:
    problem = member.problem
    return None if problem.start_from is None else members[problem.depends_on[problem.start_from]]


def check_start(member: Member, members: Members) -> None:
    """Raise an error if a problem cannot be put at the parameters that it is to start from."""
    origin = _origin(member, members)
    if origin is None:
        return
    for name, p in zip(member.names.trainable, member.trainable, strict=True):
        other = origin.parameters.get(name)
        if other is None or other.shape != p.shape:
            got = "none" if other is None else f"one of shape {tuple(other.shape)}"
            raise ConfigurationError(
                f"problem {member.name!r}, start_from={member.problem.start_from!r}: expected a parameter {name!r} of "
                f"shape {tuple(p.shape)} in problem {origin.name!r}; got {got}. Give both modules the same parameters."
            )


def check_recording(graph: ProblemGraph, member: Member) -> None:
    """Raise an error for a method that needs steps which a problem does not take, or whose formula is not known."""
    problem, method = member.problem, graph.method(member.name)
    if not graph.readers(member.name) or not (method.recorded_steps(1) or method.needs_update_derivative):
        return
    what = f"problem {member.name!r}, hypergradient={type(method).__name__}"
    if problem.optimizer is None:
        raise ConfigurationError(f"{what}: expected an optimizer, through whose steps it differentiates; got none.")
    wanted = getattr(method, "steps", None)
    if wanted is not None and wanted > problem.steps:
        raise ConfigurationError(
            f"{what}(steps={wanted}): expected at most the {problem.steps} steps of one solve of the problem, since "
            f"earlier ones were made for other values of what it depends on. Give the problem steps={wanted}."
        )
    if wanted is not None and wanted < problem.steps and problem.start_from is not None:
        raise ConfigurationError(
            f"{what}(steps={wanted}): expected all {problem.steps} steps, since the problem starts over "
            f"(start_from={problem.start_from!r}) and its gradient has to reach the beginning. Use Unroll()."
        )
    try:
        differentiable_step(problem.optimizer, member.trainable)
    except ConfigurationError as error:
        raise ConfigurationError(f"{what}: {error}") from None
