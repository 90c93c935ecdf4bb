"""What a graph says of its problems, against derivations by hand and by brute force, and how it is drawn."""

from __future__ import annotations

import itertools
import random
from textwrap import dedent

import pytest
import torch
from torch import nn

import mlo


class Stage(mlo.Problem):
    """A problem of which only the edges matter; it has `size` trainable numbers and as many frozen ones."""

    def __init__(self, name, depends_on=(), size=2, **options):
        module = nn.ParameterDict({"w": torch.ones(size)})
        module["frozen"] = nn.Parameter(torch.ones(size), requires_grad=False)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        super().__init__(name, module, optimizer=optimizer, depends_on=depends_on, **options)

    def training_step(self, batch):
        w = self.params["w"]
        return w.square().sum() + sum((w.sum() - self.deps[d].params["w"].sum()) ** 2 for d in self.deps)


def graph_of(*definitions):
    """The graph of an engine; a definition is (name, names it depends on[, constants])."""
    return mlo.Engine([Stage(name, reads, constants=tuple(*given)) for name, reads, *given in definitions]).graph


# --- by hand ---------------------------------------------------------------------------------------------------
#
# R (responses): earlier problems read, directly or through others. I (internal): those of R from which one comes
# back to the problem over problems earlier than it. `inputs`: what the problem and its internal responses depend on,
# but for these themselves. U (upper): the later ones among all that can be reached over earlier ones. `order`: R
# such that a response comes after those that it takes as inputs. `readers` of d: the p with d in I(p). A root is
# read as a response by nobody.

TWO_LEVELS = {
    "graph": [("w", ["top"]), ("top", ["w"])],
    # w reads nothing earlier. w depends on top, so that its response is internal to top.
    "responses": {"w": "", "top": "w"},
    "internal": {"w": "", "top": "w"},
    "inputs": {"w": "top", "top": ""},
    "upper": {"w": "top", "top": ""},
    "order": {"w": "", "top": "w"},
    "readers": {"w": "top", "top": ""},
    "roots": "top",
    "edges": "w>top:constraint top>w:response",
}

CHAIN = {
    # The names are not in alphabetical order, and the dependencies not in solve order: neither must matter.
    "graph": [("d", ["top"]), ("c", ["top", "d"]), ("b", ["top", "c"]), ("a", ["top", "b"]), ("top", ["a"])],
    # Each stage reads its predecessor and with it all before. From none of them can one come back to a stage: the
    # way to a later stage leads over top. From each one comes to top, whose loss reads only the last.
    "responses": {"d": "", "c": "d", "b": "d c", "a": "d c b", "top": "d c b a"},
    "internal": {"d": "", "c": "", "b": "", "a": "", "top": "d c b a"},
    # Nothing is left of top's own: a is internal, and the others depend on each other and on top.
    "inputs": {"d": "top", "c": "d top", "b": "c top", "a": "b top", "top": ""},
    "upper": {"d": "top", "c": "top", "b": "top", "a": "top", "top": ""},
    "order": {"d": "", "c": "d", "b": "d c", "a": "d c b", "top": "d c b a"},
    # b reads c's response, but no gradient of b flows through it.
    "readers": {"d": "top", "c": "top", "b": "top", "a": "top", "top": ""},
    "roots": "top",
    "edges": "d>top:constraint c>d:response c>top:constraint b>c:response b>top:constraint a>b:response "
    "a>top:constraint top>a:response",
}

DIAMOND = {
    # left and free do not name top: left depends on it through base, free not at all.
    "graph": [
        ("base", ["top"]),
        ("free", []),
        ("left", ["base"]),
        ("right", ["top", "base"]),
        ("join", ["right", "left", "free"]),
        ("top", ["join"]),
    ],
    "responses": {
        "base": "",
        "free": "",
        "left": "base",
        "right": "base",
        "join": "base free left right",
        "top": "base free left right join",
    },
    # From free one comes nowhere, so that its response is a constant for top.
    "internal": {"base": "", "free": "", "left": "", "right": "", "join": "", "top": "base left right join"},
    # free is an ordinary input of join's node. It stays one when join is rebuilt inside the gradient of top.
    "inputs": {
        "base": "top",
        "free": "",
        "left": "base",
        "right": "base top",
        "join": "free left right",
        "top": "free",
    },
    "upper": {"base": "top", "free": "", "left": "top", "right": "top", "join": "top", "top": ""},
    "order": {
        "base": "",
        "free": "",
        "left": "base",
        "right": "base",
        "join": "base free left right",
        "top": "base free left right join",
    },
    "readers": {"base": "top", "free": "", "left": "top", "right": "top", "join": "top", "top": ""},
    "roots": "top",
    "edges": "base>top:constraint left>base:response right>base:response right>top:constraint join>free:response "
    "join>left:response join>right:response top>join:response",
}

NESTED = {
    "graph": [("low", ["top", "mid"]), ("mid", ["top", "low"]), ("top", ["low", "mid"])],
    "responses": {"low": "", "mid": "low", "top": "low mid"},
    # low depends on mid: inside mid's gradient it is rebuilt.
    "internal": {"low": "", "mid": "low", "top": "low mid"},
    # With low inside it, mid's node takes top only.
    "inputs": {"low": "mid top", "mid": "top", "top": ""},
    "upper": {"low": "mid top", "mid": "top", "top": ""},
    # low takes mid as an input, so that mid's node is made first, against the solve order.
    "order": {"low": "", "mid": "low", "top": "mid low"},
    "readers": {"low": "mid top", "mid": "top", "top": ""},
    "roots": "top",
    "edges": "low>mid:constraint low>top:constraint mid>low:response mid>top:constraint top>low:response "
    "top>mid:response",
}

TWO_UPPER = {
    "graph": [("w", ["b", "a"]), ("a", ["w"]), ("b", ["w"], ["a"])],
    # b takes a as given: it does not read a's response.
    "responses": {"w": "", "a": "w", "b": "w"},
    "internal": {"w": "", "a": "w", "b": "w"},
    # What w depends on beside the one in question: each upper problem takes the other's value.
    "inputs": {"w": "a b", "a": "b", "b": "a"},
    # a's solution depends on b through w; b's does on a, which is earlier and no upper problem of it.
    "upper": {"w": "a b", "a": "b", "b": ""},
    "order": {"w": "", "a": "w", "b": "w"},
    "readers": {"w": "a b", "a": "", "b": ""},
    "roots": "a b",
    # constants make no edge of their own.
    "edges": "w>a:constraint w>b:constraint a>w:response b>w:response",
}

# The same with a in the loss of b: now there is an edge, and it is a constant one.
TWO_UPPER_ONE_READS = {
    **TWO_UPPER,
    "graph": [("w", ["b", "a"]), ("a", ["w"]), ("b", ["a", "w"], ["a"])],
    "edges": "w>a:constraint w>b:constraint a>w:response b>w:response b>a:constant",
}

# The other reading: b leads a, which is nested between w and b.
TWO_UPPER_ONE_LEADS = {
    "graph": [("w", ["b", "a"]), ("a", ["w"]), ("b", ["w", "a"])],
    "responses": {"w": "", "a": "w", "b": "w a"},
    # From a one comes to b over w.
    "internal": {"w": "", "a": "w", "b": "w a"},
    "inputs": {"w": "a b", "a": "b", "b": ""},
    "upper": {"w": "a b", "a": "b", "b": ""},
    "order": {"w": "", "a": "w", "b": "a w"},
    "readers": {"w": "a b", "a": "b", "b": ""},
    "roots": "b",
    "edges": "w>a:constraint w>b:constraint a>w:response b>w:response b>a:response",
}

CHAIN_GIVEN = {
    # top takes the first stage as given, which the second one reads: not a response of top, but a value that the
    # second one's node needs.
    "graph": [("first", ["top"]), ("second", ["first", "top"]), ("top", ["second"], ["first"])],
    "responses": {"first": "", "second": "first", "top": "second"},
    "internal": {"first": "", "second": "", "top": "second"},
    "inputs": {"first": "top", "second": "first top", "top": "first"},
    "upper": {"first": "top", "second": "top", "top": ""},
    "order": {"first": "", "second": "first", "top": "second"},
    "readers": {"first": "", "second": "top", "top": ""},
    "roots": "top",
    "edges": "first>top:constraint second>first:response second>top:constraint top>second:response",
}

BY_HAND = {
    "two_levels": TWO_LEVELS,
    "chain": CHAIN,
    "diamond": DIAMOND,
    "nested": NESTED,
    "two_upper": TWO_UPPER,
    "two_upper_one_reads": TWO_UPPER_ONE_READS,
    "two_upper_one_leads": TWO_UPPER_ONE_LEADS,
    "chain_given": CHAIN_GIVEN,
}
VIEWS = ("responses", "internal", "inputs", "upper", "order", "readers")


@pytest.mark.parametrize("case", BY_HAND)
def test_views_equal_those_derived_by_hand(case):
    expected = BY_HAND[case]
    graph = graph_of(*expected["graph"])
    for view in VIEWS:
        found = {name: " ".join(getattr(graph, view)(name)) for name in graph.names}
        assert found == expected[view], view
    assert " ".join(graph.roots) == expected["roots"]
    assert " ".join(f"{reader}>{d}:{kind}" for reader, d, kind in graph.edges()) == expected["edges"]


def test_the_order_of_a_diamond_below_two_nested_levels():
    # mid leads low, and both depend on base: base before both, mid before low.
    graph = graph_of(
        ("low", ["mid", "base", "top"]), ("base", ["top"]), ("mid", ["low", "base"]), ("top", ["mid", "low", "base"])
    )
    assert graph.order("mid") == ("base", "low")
    assert graph.order("top") == ("base", "mid", "low")
    assert graph.internal_order("mid") == ("low",)
    assert graph.inputs("mid") == ("base", "top")


def test_two_roles_of_one_problem_are_one_edge():
    graph = mlo.Engine([Stage("w", {"now": "top", "then": "top"}), Stage("top", {"stage": "w"})]).graph
    assert graph.edges() == (("w", "top", "constraint"), ("top", "w", "response"))


# --- by brute force --------------------------------------------------------------------------------------------


def reachable(start, step):
    """Everything that repeated `step` leads to from `start`."""
    found, todo = set(), list(step(start))
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(step(node))
    return found


class Naive:
    """The definitions of the design, word for word, by searches; problems are their positions in the solve order."""

    def __init__(self, reads, constants):
        self.reads, self.constants = reads, constants
        every = range(len(reads))
        self.responses = [self.find_responses(p) for p in every]
        self.internal = [{d for d in self.responses[p] if p in self.solution_depends_on(d, p)} for p in every]
        self.upper = [{q for q in self.solution_depends_on(p, p) if q > p} for p in every]
        # Internal responses are rebuilt inside the node: what they read is read by the node.
        self.inputs = [set().union(*(reads[v] for v in {p, *self.internal[p]})) - self.internal[p] - {p} for p in every]
        self.readers = [{p for p in every if d in self.internal[p]} for d in every]
        self.roots = [d for d in every if not any(d in reads[p] - constants[p] for p in range(d + 1, len(reads)))]

    def find_responses(self, p):
        """Earlier problems that p reads, directly or through other responses; what p takes as given is none."""
        return reachable(p, lambda v: {d for d in self.reads[v] if d < v} - self.constants[v] - self.constants[p])

    def solution_depends_on(self, start, p):
        """What the solution of `start` is a function of, in p's view: the way leads over problems earlier than p."""

        def step(v):
            return self.reads[v] if v == start or (v < p and v not in self.constants[p]) else ()

        return reachable(start, step)

    @property
    def legal(self):
        """Whether every problem says how it treats those between itself and a response that depends on them."""
        every = range(len(self.reads))
        said = [self.responses[p] | self.constants[p] for p in every]
        silent = any(d < q < p and q not in said[p] for p in every for d in self.responses[p] for q in self.reads[d])
        alone = [p for p in every if not self.reads[p] and not any(p in r for r in self.reads)]
        return not silent and not (alone and len(self.reads) > 1)


NAMES = "zyxwvu"  # solve order is not alphabetical order
MODULE = nn.Linear(1, 1)


class Node(mlo.Problem):
    """Nothing but a name and edges: a graph looks at no more, and thousands of them are made quickly."""

    def training_step(self, batch):
        raise AssertionError


def build(reads, constants):
    def names(problems):
        return [NAMES[d] for d in sorted(problems, reverse=True)]

    everything = zip(NAMES, reads, constants, strict=False)
    return mlo.ProblemGraph([Node(n, MODULE, depends_on=names(r), constants=names(c)) for n, r, c in everything])


def disagreements(graph, naive):
    """The views in which a graph is not what the definitions say."""

    def named(problems):
        return tuple(NAMES[d] for d in sorted(problems))

    found = [
        f"{view}({name}) = {getattr(graph, view)(name)}, expected {named(expected)}"
        for view in ("responses", "internal", "upper", "inputs", "readers")
        for name, expected in zip(NAMES, getattr(naive, view), strict=False)
        if getattr(graph, view)(name) != named(expected)
    ]
    if graph.roots != named(naive.roots):
        found.append(f"roots = {graph.roots}, expected {named(naive.roots)}")
    for name in graph.names:
        order = graph.order(name)
        early = [(d, q) for i, d in enumerate(order) for q in graph.inputs(d) if q in order[i:]]
        if sorted(order) != sorted(graph.responses(name)) or early:
            found.append(f"order({name}) = {order}, of {graph.responses(name)}, made before an input: {early}")
    return found


def check(reads, constants):
    """Whether the graph is accepted; where it is, it must be what the definitions say."""
    naive = Naive(reads, constants)
    try:
        graph = build(reads, constants)
    except mlo.GraphError:
        return False, naive.legal
    found = disagreements(graph, naive)
    assert not found, f"reads {reads}, constants {constants}: {'; '.join(found)}"
    return True, naive.legal


def test_every_graph_of_up_to_four_problems_equals_the_definitions():
    accepted = 0
    for n in range(1, 5):
        pairs = [(a, b) for a in range(n) for b in range(n) if a != b]
        for chosen in itertools.product((False, True), repeat=len(pairs)):
            reads = [{b for (a, b), c in zip(pairs, chosen, strict=True) if c and a == p} for p in range(n)]
            taken, legal = check(reads, [set()] * n)
            assert taken == legal, reads
            accepted += taken
    assert accepted > 2000


@pytest.mark.parametrize("n", [5, 6])
def test_random_graphs_equal_the_definitions(n):
    rng, accepted = random.Random(n), 0
    for _ in range(1000):
        density = rng.choice([0.2, 0.3, 0.5, 0.8])
        reads = [{b for b in range(n) if b != a and rng.random() < density} for a in range(n)]
        taken, legal = check(reads, [set()] * n)
        assert taken == legal, reads
        accepted += taken
    assert accepted > 200


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_random_graphs_with_problems_taken_as_given_equal_the_definitions(n):
    # A constant is one that no response on the way is itself led by: upper problems beside each other. (Where a
    # response that p reads leads what p takes as given, the words of the definitions allow two readings.)
    rng, accepted = random.Random(n), 0
    for _ in range(1000):
        density = rng.choice([0.3, 0.5, 0.8])
        reads = [{b for b in range(n) if b != a and rng.random() < density} for a in range(n)]
        constants = beside(reads, rng)
        if any(constants):
            taken, legal = check(reads, constants)
            assert legal or not taken, (reads, constants)
            accepted += taken
    assert accepted > 150


def beside(reads, rng):
    """Random constants of each problem: earlier ones that matter to it, and none that its responses read."""
    constants, responses = [], []
    for p, own in enumerate(reads):
        given = {q for q in range(p) if rng.random() < 0.35}
        while True:
            read = {d for d in own if d < p} - given
            read = read.union(*(responses[d] for d in read))
            needed = own.union(*(reads[d] for d in read))
            wrong = {q for q in given if q in read or q not in needed}
            if not wrong:
                break
            given -= wrong
        constants.append(given)
        responses.append(read)
    return constants


# --- drawing ---------------------------------------------------------------------------------------------------


def text(block):
    return dedent(block).strip("\n")


def small_graph():
    return mlo.Engine(
        [
            Stage("encoder", {"architecture": "arch"}, size=1200, steps=3, hypergradient=mlo.FiniteDifference()),
            Stage("arch", ["encoder"], size=28),
        ]
    ).graph


def graph_with_all_kinds():
    return mlo.Engine(
        [
            Stage("w", ["b", "a"], steps=10, hypergradient=mlo.StopGradient()),
            Stage("free", [], size=1),
            Stage("a", ["w", "free"]),
            Stage("b", ["a", "w"], size=1_000_000, constants=["a"]),
        ]
    ).graph


def test_table():
    # Frozen parameters do not count, and a stage without a reader needs no method.
    assert str(small_graph()) == text("""
        order  problem  reads               method            parameters  steps
        1      encoder  arch (constraint)   FiniteDifference  1,200       3
        2      arch     encoder (response)  –                 28          1
    """)
    # Default method only where a gradient flows: that of `a` does not flow through `free`.
    assert str(graph_with_all_kinds()) == text("""
        order  problem  reads                           method        parameters  steps
        1      w        a (constraint), b (constraint)  StopGradient  2           10
        2      free     –                               –             1           1
        3      a        w (response), free (response)   –             2           1
        4      b        w (response), a (constant)      –             1,000,000   1
    """)


def test_table_shows_the_other_reading_of_two_problems_that_read_each_other():
    first, second = Stage("a", ["b"]), Stage("b", ["a"])
    assert str(mlo.Engine([first, second]).graph) == text("""
        order  problem  reads           method             parameters  steps
        1      a        b (constraint)  ConjugateGradient  2           1
        2      b        a (response)    –                  2           1
    """)
    assert str(mlo.Engine([second, first]).graph) == text("""
        order  problem  reads           method             parameters  steps
        1      b        a (constraint)  ConjugateGradient  2           1
        2      a        b (response)    –                  2           1
    """)


def test_mermaid():
    assert small_graph().to_mermaid() == text("""
        flowchart BT
            p1["encoder"]
            p2["arch"]
            p2 -.->|constraint| p1
            p1 -->|response| p2
    """)
    assert graph_with_all_kinds().to_mermaid() == text("""
        flowchart BT
            p1["w"]
            p2["free"]
            p3["a"]
            p4["b"]
            p3 -.->|constraint| p1
            p4 -.->|constraint| p1
            p1 -->|response| p3
            p2 -->|response| p3
            p1 -->|response| p4
            p3 -.->|constant| p4
    """)


def test_dot():
    assert small_graph().to_dot() == text("""
        digraph problems {
            rankdir=BT;
            "encoder" [shape=box];
            "arch" [shape=box];
            "arch" -> "encoder" [label="constraint", style=dashed];
            "encoder" -> "arch" [label="response", style=solid];
        }
    """)
    assert graph_with_all_kinds().to_dot() == text("""
        digraph problems {
            rankdir=BT;
            "w" [shape=box];
            "free" [shape=box];
            "a" [shape=box];
            "b" [shape=box];
            "a" -> "w" [label="constraint", style=dashed];
            "b" -> "w" [label="constraint", style=dashed];
            "w" -> "a" [label="response", style=solid];
            "free" -> "a" [label="response", style=solid];
            "w" -> "b" [label="response", style=solid];
            "a" -> "b" [label="constant", style=dotted];
        }
    """)
