"""The graph around one problem, as its evaluations and steps go through it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mlo.graph import ProblemGraph
from mlo.hypergradient import HypergradientMethod

if TYPE_CHECKING:
    from mlo.member import Member


class Links:
    """What the graph says of one problem, with the problems themselves in the place of names.

    The graph is asked once: to look this up at every evaluation takes a good part of a small step's time.

    Attributes:
        method: the hypergradient method of its response.
        is_read: whether the gradient of another problem flows through its response.
        records: whether its method may want optimizer steps to be recorded.
        proxied: those that its loss reads as responses which carry a gradient of the problem.
        constant: the others whose values its loss, or one of these responses, takes.
        responses: the problems whose responses it reads, directly or through others, highest first.
        nested: those among them that are rebuilt inside its own gradient, in order of evaluation.
        sweep: those through which its gradient flows, highest first, each with the names of its inputs and whether the
            gradient is wanted there.
        hands_over: whether all of their methods leave their results to the caller.
        inputs: the problems whose values its response node takes.
        involved: those whose losses or values its gradient takes, itself included.
        lower: the problems whose solution depends on it.

    """

    def __init__(self, graph: ProblemGraph, members: Mapping[str, Member], name: str) -> None:
        """Ask the graph."""
        carrying = graph.carrying(name)
        proxied = [d for d in graph.direct(name) if d in carrying]
        wanted = {name, *carrying}
        self.method = graph.method(name)
        self.is_read = bool(graph.readers(name))
        self.records = self.is_read and type(self.method).recorded_steps is not HypergradientMethod.recorded_steps
        self.proxied = tuple(members[d] for d in proxied)
        self.constant = tuple(members[d] for d in graph.seen(name) if d not in proxied)
        self.responses = tuple(members[d] for d in reversed(graph.responses(name)))
        self.nested = tuple(members[d] for d in graph.internal_order(name))
        self.sweep = tuple((members[d], tuple((q, q in wanted) for q in graph.inputs(d))) for d in reversed(carrying))
        self.hands_over = all(graph.method(d).hands_over for d in carrying)
        self.inputs = tuple(members[q] for q in graph.inputs(name))
        self.involved = tuple(dict.fromkeys((*self.responses, *members[name].seen.values())))
        self.lower = tuple(members[d] for d in graph.lower(name))
