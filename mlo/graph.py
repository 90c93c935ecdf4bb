"""`ProblemGraph`: what the solve order and the dependencies of problems imply, and the checks on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from mlo.errors import GraphError
from mlo.hypergradient import ConjugateGradient, HypergradientMethod, ImplicitMethod
from mlo.hypergradient.scaling import missing_learning_rate
from mlo.problem import Problem

_READS_WIDTH = 72

EdgeKind = Literal["response", "constraint", "constant"]


class ProblemGraph:
    """Problems in solve order, lowest level first, and the edges between them.

    An edge p → d (p depends on d) is a *response* edge where d comes earlier: p's loss sees d's solution,
    and p's gradient flows back through it. It is a *constraint* edge where d comes later: p's loss sees
    d's present value, and d's hypergradient flows through p's response. An earlier d that p names in
    `constants` is taken as given.

    `str(graph)` is a table; `to_mermaid()` and `to_dot()` draw the graph.

    Raises:
        GraphError: names are unknown, repeated or clash, a problem depends on itself or stands alone, a
            response needs a problem that the reader neither reads nor takes as given, problems take each
            other's responses as given, or a hypergradient method cannot do what the graph asks of it.

    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        """Derive and check everything."""
        self._problems = {p.name: p for p in problems}
        self.names: tuple[str, ...] = tuple(p.name for p in problems)
        self._position = {name: i for i, name in enumerate(self.names)}
        self._check_names(problems)
        self._direct = {p.name: self._sorted(set(p.depends_on.values())) for p in problems}
        self._methods = {p.name: p.hypergradient or ConjugateGradient() for p in problems}
        self._responses: dict[str, tuple[str, ...]] = {}
        self._internal: dict[str, tuple[str, ...]] = {}
        self._inputs: dict[str, tuple[str, ...]] = {}
        for name in self.names:  # each one rests on the earlier ones
            self._responses[name] = self._find_responses(name)
            self._check_leads(name)
            self._internal[name] = self._find_internal(name)
            self._inputs[name] = self._find_inputs(name)
        self._upper = {name: self._find_upper(name) for name in self.names}
        self._lower = {name: tuple(n for n in self.names if name in self._upper[n]) for name in self.names}
        self._readers = {name: tuple(p for p in self.names if name in self._internal[p]) for name in self.names}
        self._orders = {name: self._find_order(name, self._responses[name]) for name in self.names}
        self._internal_orders = {name: self._find_order(name, self._internal[name]) for name in self.names}
        self._carrying = {name: self._find_carrying(name) for name in self.names}
        self._seen = {name: self._find_seen(name) for name in self.names}
        read = {d for name in self.names for d in self.direct(name) if self.kind(name, d) == "response"}
        #: Problems that no other reads as a response, in solve order.
        self.roots: tuple[str, ...] = tuple(name for name in self.names if name not in read)
        self._check_connected()
        self._check_constants()
        self._check_methods()

    # --- what the graph is -------------------------------------------------------------------------------------

    def direct(self, name: str) -> tuple[str, ...]:
        """Return the problems that `name` declares to depend on, each once, in solve order."""
        return self._direct[name]

    def kind(self, name: str, dependency: str) -> EdgeKind:
        """Return the kind of the edge from `name` to one of its dependencies."""
        if self._position[dependency] > self._position[name]:
            return "constraint"
        return "constant" if dependency in self._problems[name].constants else "response"

    def responses(self, name: str) -> tuple[str, ...]:
        """Return R(name): the responses that `name` reads, directly or through other responses."""
        return self._responses[name]

    def internal(self, name: str) -> tuple[str, ...]:
        """Return the responses among R(name) whose solution depends on `name` itself.

        They are rebuilt inside the gradient of `name`; only through them does a gradient of `name` flow.
        """
        return self._internal[name]

    def inputs(self, name: str) -> tuple[str, ...]:
        """Return the problems whose values the response node of `name` takes as inputs."""
        return self._inputs[name]

    def upper(self, name: str) -> tuple[str, ...]:
        """Return U(name): the later problems that the solution of `name` depends on, directly or through others."""
        return self._upper[name]

    def lower(self, name: str) -> tuple[str, ...]:
        """Return the problems whose solution depends on `name`: those with `name` in U."""
        return self._lower[name]

    def order(self, name: str) -> tuple[str, ...]:
        """Return R(name) in an order in which every response node finds its inputs."""
        return self._orders[name]

    def internal_order(self, name: str) -> tuple[str, ...]:
        """Return `internal(name)` in an order in which every response node finds its inputs."""
        return self._internal_orders[name]

    def carrying(self, name: str) -> tuple[str, ...]:
        """Return those of `internal_order(name)` through which a gradient of `name` flows with their methods."""
        return self._carrying[name]

    def seen(self, name: str) -> tuple[str, ...]:
        """Return the other problems whose values the loss of `name`, or a response that carries its gradient, takes."""
        return self._seen[name]

    def readers(self, name: str) -> tuple[str, ...]:
        """Return the problems whose gradient flows through the response of `name`."""
        return self._readers[name]

    def method(self, name: str) -> HypergradientMethod:
        """Return the hypergradient method of a problem (by default conjugate gradients, right in every graph)."""
        return self._methods[name]

    # --- deriving it -------------------------------------------------------------------------------------------

    def _sorted(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(names, key=self._position.__getitem__))

    def _find_responses(self, name: str) -> tuple[str, ...]:
        """Follow response edges down; what lies only behind a problem that is taken as given is not read."""
        found: set[str] = set()
        pending = [name]
        while pending:
            reader = pending.pop()
            for d in self.direct(reader):
                new = d not in found and d not in self._problems[name].constants
                if new and self.kind(reader, d) == "response":
                    found.add(d)
                    pending.append(d)
        return self._sorted(found)

    def _find_carrying(self, name: str) -> tuple[str, ...]:
        found = [name]
        for d in self._internal_orders[name]:
            if self._methods[d].carries_gradient and not set(found).isdisjoint(self._inputs[d]):
                found.append(d)
        return tuple(found[1:])

    def _find_seen(self, name: str) -> tuple[str, ...]:
        carrying = self._carrying[name]
        found = {*self._direct[name], *carrying, *(q for d in carrying for q in self._inputs[d])}
        return self._sorted(found - {name})

    def _find_internal(self, name: str) -> tuple[str, ...]:
        """Find the members d of R(name) from which `name` can be reached over inputs of response nodes."""
        found: set[str] = set()
        candidates = set(self._responses[name])
        while True:
            more = {d for d in candidates - found if {name, *found} & set(self._inputs[d])}
            if not more:
                return self._sorted(found)
            found |= more

    def _find_inputs(self, name: str) -> tuple[str, ...]:
        internal = set(self._internal[name])
        found = set(self.direct(name)).union(*(self._inputs[d] for d in internal))
        return self._sorted(found - internal - {name})

    def _find_upper(self, name: str) -> tuple[str, ...]:
        read = set(self.direct(name)).union(*(self._inputs[d] for d in self._responses[name]))
        return tuple(q for q in self._sorted(read) if self._position[q] > self._position[name])

    def _find_order(self, name: str, nodes: tuple[str, ...]) -> tuple[str, ...]:
        order: list[str] = []
        path: list[str] = []

        def visit(node: str) -> None:
            if node in order:
                return
            if node in path:
                ring = path[path.index(node) :]
                raise GraphError(
                    f"problem {name!r} reads the responses of {_listed(ring)}, each of which takes the other as given: "
                    "that is a game between them, not a nested problem, and has no order of solution. Let one of them "
                    f"lead: remove it from the other's constants and let it depend on the other."
                )
            path.append(node)
            for needed in self._inputs[node]:
                if needed in nodes:
                    visit(needed)
            path.pop()
            order.append(node)

        for node in nodes:
            visit(node)
        return tuple(order)

    # --- checking it -------------------------------------------------------------------------------------------

    def _check_names(self, problems: Sequence[Problem]) -> None:
        repeated = sorted({n for n in self.names if self.names.count(n) > 1})
        if repeated:
            raise GraphError(f"problem names must be unique; {_listed(repeated)} given more than once. Rename one.")
        known = _listed(self.names)
        for p in problems:
            for option, names in (("depends_on", p.depends_on.values()), ("constants", p.constants)):
                for d in names:
                    if d == p.name:
                        raise GraphError(
                            f"problem {p.name!r}, {option}: names itself; expected other problems. Inside its loss use "
                            "self(...) and self.params."
                        )
                    if d not in self._position:
                        raise GraphError(
                            f"problem {p.name!r}, {option}: unknown problem {d!r}; the engine holds {known}. Correct "
                            "the name, or add the problem to the engine."
                        )

    def _check_leads(self, name: str) -> None:
        """Raise the error for a response that depends on a problem in between that `name` says nothing about."""
        reads, given = self._responses[name], self._problems[name].constants
        for d in reads:
            for q in self._inputs[d]:
                if self._position[q] < self._position[name] and q not in reads and q not in given:
                    raise GraphError(
                        f"problem {name!r} reads the response of {d!r}, which depends on {q!r}; expected {name!r} to "
                        f"say how it treats {q!r}. Either it leads {q!r} (depends_on {q!r}: the hypergradient flows "
                        f"through the response of {q!r}), or it takes its present value as given (constants=({q!r},))."
                    )

    def _check_connected(self) -> None:
        if len(self.names) == 1:
            return
        linked = {end for reader, dependency, _ in self.edges() for end in (reader, dependency)}
        for name in self.names:
            if name not in linked:
                raise GraphError(
                    f"problem {name!r} has no edge to any other of the {len(self.names)} problems; expected one in "
                    "depends_on. Train it by an engine of its own, or let another problem depend on it."
                )

    def _check_constants(self) -> None:
        for name, problem in self._problems.items():
            needed = set(self.direct(name)).union(*(self._inputs[d] for d in self._responses[name]))
            for q in problem.constants:
                if self._position[q] > self._position[name]:
                    raise GraphError(
                        f"problem {name!r}, constants: {q!r} comes later in the solve order, and a later problem is "
                        "taken as given anyway; expected earlier ones. Remove it from constants."
                    )
                if q not in needed:
                    raise GraphError(
                        f"problem {name!r}, constants: {q!r} is neither a dependency of {name!r} nor of a response "
                        "that it reads; expected only problems that matter to its loss. Remove it from constants."
                    )

    def _check_methods(self) -> None:
        for name in self.names:
            if self.readers(name):
                self._check_method(name, self.method(name))

    def _check_method(self, name: str, method: HypergradientMethod) -> None:
        kind = type(method).__name__
        if not method.carries_gradient:
            return
        if method.needs_learning_rate and self._problems[name].optimizer is None:
            raise missing_learning_rate(method, name)
        nested = [d for d in self._internal[name] if self.method(d).carries_gradient]
        if nested and not method.allows_internal_responses:
            raise GraphError(
                f"problem {name!r}, hypergradient={kind}: its own loss reads the response of {_listed(nested)}, which "
                f"depends on {name!r} in turn; {_described(method)} holds that response fixed, which would be wrong, "
                f"not approximate. Use {_differentiable(method)} at this problem."
            )
        for d in nested:
            if not self.method(d).differentiable:
                raise GraphError(
                    f"problem {d!r}, hypergradient={type(self.method(d)).__name__}: its response stands inside the "
                    f"loss of {name!r}, whose hypergradient needs a derivative of this method, and "
                    f"{_described(self.method(d))} has none. Use {_differentiable(self.method(d))} at {d!r}."
                )

    def why_no_gradient(self, name: str) -> str:
        """Return sentences on why a loss that reads other problems may not depend on its own parameters."""
        reasons = [reason for d in self.direct(name) if (reason := self._why_cut(name, d)) is not None]
        return f" It reads {'; '.join(reasons)}." if reasons else ""

    def _why_cut(self, name: str, d: str) -> str | None:
        kind = self.kind(name, d)
        if kind == "constraint":
            return f"{d!r}, which comes later and is taken as given (lower problems come first in mlo.Engine)"
        if kind == "constant":
            return f"{d!r}, which constants= takes as given"
        if d not in self._internal[name]:
            return f"{d!r}, whose solution does not depend on {name!r} (it needs depends_on={name!r})"
        if not self.method(d).carries_gradient:
            return f"{d!r}, whose {type(self.method(d)).__name__} carries no gradient"
        return f"{d!r}, whose loss must use {name!r} differentiably (no .item(), .data or detach())"

    # --- showing it --------------------------------------------------------------------------------------------

    def edges(self) -> tuple[tuple[str, str, EdgeKind], ...]:
        """Return (reader, dependency, kind) for every declared dependency, in solve order."""
        return tuple((name, d, self.kind(name, d)) for name in self.names for d in self.direct(name))

    def __str__(self) -> str:
        """Return the table of the graph."""
        header = ("order", "problem", "reads", "method", "parameters", "steps")
        rows: list[tuple[str, ...]] = [header]
        for i, name in enumerate(self.names, 1):
            rows += self._rows(i, self._problems[name])
        widths = [max(len(row[c]) for row in rows) for c in range(len(header))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def _rows(self, order: int, p: Problem) -> list[tuple[str, ...]]:
        """Return the line of a problem, and further ones where it reads more than fits in one."""
        reads = self._reads(p)
        method = type(self.method(p.name)).__name__ if self.readers(p.name) else "–"
        count = sum(t.numel() for t in p.module.parameters() if t.requires_grad)
        first = (str(order), p.name, reads[0], method, f"{count:,}", str(p.steps))
        return [first, *(("", "", more, "", "", "") for more in reads[1:])]

    def _reads(self, p: Problem) -> list[str]:
        named = [f"{d} ({self.kind(p.name, d)})" for d in self.direct(p.name)]
        named += [f"{q} (given)" for q in p.constants if q not in self.direct(p.name)]
        lines: list[str] = []
        for i, one in enumerate(named):
            text = one + ("," if i + 1 < len(named) else "")
            if lines and len(lines[-1]) + len(text) < _READS_WIDTH:
                lines[-1] += f" {text}"
            else:
                lines.append(text)
        return lines or ["–"]

    def to_mermaid(self) -> str:
        """Return the graph as Mermaid flowchart: solid arrows for responses, dotted ones for what is given."""
        # The nodes have identifiers of their own: Mermaid takes names such as "end" for its own words.
        node = {name: f"p{i}" for i, name in enumerate(self.names, 1)}
        lines = ["flowchart BT", *(f'    {node[name]}["{name}"]' for name in self.names)]
        arrows = {"response": "-->", "constraint": "-.->", "constant": "-.->"}
        lines += [f"    {node[d]} {arrows[kind]}|{kind}| {node[name]}" for name, d, kind in self.edges()]
        return "\n".join(lines)

    def to_dot(self) -> str:
        """Return the graph in Graphviz' DOT: solid arrows for responses, dashed ones for what is given."""
        lines = ["digraph problems {", "    rankdir=BT;", *(f'    "{name}" [shape=box];' for name in self.names)]
        styles = {"response": "solid", "constraint": "dashed", "constant": "dotted"}
        lines += [f'    "{d}" -> "{name}" [label="{kind}", style={styles[kind]}];' for name, d, kind in self.edges()]
        return "\n".join([*lines, "}"])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _described(method: HypergradientMethod) -> str:
    """Return the name of a method, with that of its products where they are not the usual ones."""
    kind, product = type(method).__name__, getattr(method, "product", None)
    return kind if product is None or product.differentiable else f"{kind} with {type(product).__name__}"


def _differentiable(method: HypergradientMethod) -> str:
    """Return what can be differentiated, for a method that cannot."""
    if isinstance(method, ImplicitMethod) and not method.product.differentiable:
        return f"{type(method).__name__} with mlo.DoubleBackward()"
    return "ConjugateGradient, Neumann, Identity or Dense"
