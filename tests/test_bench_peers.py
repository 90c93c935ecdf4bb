"""The benchmark's adapters: the same arithmetic as ours where a library has it, and where a library is wrong, how.

The libraries come with the extra `peers` (`make test` installs them); a test whose library is missing is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import pytest
import torch

from mlo.bench.libraries.betty import Betty
from mlo.bench.libraries.boat import Boat
from mlo.bench.libraries.by_hand import ByHand
from mlo.bench.libraries.higher import Higher
from mlo.bench.libraries.jaxopt import JAXopt
from mlo.bench.libraries.ours import Ours
from mlo.bench.libraries.torchopt import TorchOpt
from mlo.bench.problems import FAMILIES
from mlo.bench.problems.dense import dense_hypergradient
from mlo.bench.specification import Method
from mlo.bench.stage import Case

LIBRARIES = {library.name: library for library in (Betty(), TorchOpt(), Higher(), Boat())}
# Rounding, which a central difference divides by its shift, and conjugate gradients carry from step to step.
SAME = 1e-10


@cache
def case_of(problem):
    family, _, size = problem.partition(" ")
    return FAMILIES[family].case(size)


def installed(library):
    reason = library.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return library


def flat(gradient, like):
    return torch.cat([gradient[name].reshape(-1) for name in like])


def difference(found, reference):
    """The relative error of one hypergradient to another, which must have the same names and shapes."""
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in reference.items()}
    assert not any(t.requires_grad for t in found.values())
    error = flat(found, reference) - flat(reference, reference)
    return (error.norm() / flat(reference, reference).norm()).item()


def compared(library, problem, method):
    """The relative difference of a library's hypergradient to ours, the same for two calls."""
    case, method = case_of(problem), Method.parse(method)
    assert library.refuses(case, method) is None
    compute = library.hypergradient(case, method)
    found = {name: t.clone() for name, t in compute().items()}
    assert difference(compute(), found) < SAME  # a call leaves everything as it was
    return difference(found, ours(problem, method))


@cache
def ours(problem, method):
    return Ours().hypergradient(case_of(problem), method)()


# --- the same arithmetic ------------------------------------------------------------------------------------------

TWO_LEVELS = ["ridge 50", "logistic breast-cancer", "reweighting digits"]
CHAINS = ["chain last-4", "chain all-4", "chain dense-4"]
HAVE = {
    "betty": ["fd", "identity", "neumann:4", "cg:1"],  # of its conjugate gradients only the first step is right
    "torchopt": ["identity", "neumann:4", "cg:1", "cg:4", "unroll:3"],
    "higher": ["unroll:3"],
    "boat": ["fd", "identity", "neumann:4", "cg:1", "cg:4", "unroll:3"],
}


def agreements():
    for library, methods in HAVE.items():
        for problem in TWO_LEVELS:
            for method in methods:
                # The network is indefinite (one step of conjugate gradients, no series), and has several batches.
                if problem == "reweighting digits" and method in ("neumann:4", "cg:4"):
                    continue
                if problem == "reweighting digits" and (library, method) == ("boat", "unroll:3"):
                    continue
                yield library, problem, method
    for problem in CHAINS:
        for method in ("fd", "identity", "neumann:4"):
            yield "betty", problem, method
    # Batch norms, whose running statistics an evaluation of some libraries changes.
    yield from (("betty", "supernet small", "fd"), ("boat", "supernet small", "fd"))
    yield from (("torchopt", "supernet small", "cg:1"), ("higher", "supernet small", "unroll:1"))


@pytest.mark.parametrize(("name", "problem", "method"), list(agreements()))
def test_the_same_hypergradient(name, problem, method):
    assert compared(installed(LIBRARIES[name]), problem, method) < SAME


_JAXOPT = """
import json, sys
from mlo.bench.libraries.jaxopt import JAXopt
from tests.test_bench_peers import compared
library = JAXopt()
assert library.unavailable() is None
print(json.dumps([compared(library, problem, method) for problem, method in json.load(sys.stdin)]))
"""


def test_the_same_hypergradient_of_jaxopt():
    """In a process of its own: JAX starts threads, and warns of every later fork."""
    if find_spec("jaxopt") is None:
        pytest.skip("jaxopt comes with the extra 'peers'")
    asked = [("ridge 50", m) for m in ("cg:5", "gmres:3", "dense", "unroll:3")] + [("logistic breast-cancer", "cg:4")]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _JAXOPT],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert ran.returncode == 0, ran.stderr
    assert len(json.loads(ran.stdout)) == len(asked)
    assert max(json.loads(ran.stdout)) < SAME


# --- where a library gives something else ------------------------------------------------------------------------


def test_conjugate_gradients_of_betty_do_not_converge():
    """The release on PyPI takes the residual of the step before for the next direction."""
    betty = installed(LIBRARIES["betty"])
    case = case_of("ridge 50")
    errors = [difference(betty.hypergradient(case, Method("cg", k))(), case.exact()) for k in (1, 5, 20)]
    ours = [difference(Ours().hypergradient(case, Method("cg", k))(), case.exact()) for k in (1, 5, 20)]
    assert errors[0] == pytest.approx(ours[0], rel=1e-10)
    assert min(errors[1:]) > 0.5
    assert ours[2] < 1e-4


def test_truncated_solves_along_each_path_of_betty_are_not_a_solve_of_the_sum():
    """A step of conjugate gradients is not linear in the right-hand side; identities and Neumann series are."""
    betty = installed(LIBRARIES["betty"])
    assert compared(betty, "chain last-4", "cg:1") < SAME  # one path
    assert 1e-3 < compared(betty, "chain all-4", "cg:1") < 1e-1


@pytest.mark.parametrize("size", ["quadratic-3", "curved-3"])
def test_betty_leaves_out_the_response_inside_a_nested_level(size):
    """It sums over paths with partial Hessians, a level in between being differentiated with the one below held fixed.

    That is what a sweep gives that takes the stages for not nested, which is wrong even where each solve is exact.
    """
    betty = installed(LIBRARIES["betty"])
    case, method = case_of(f"nested {size}"), Method("fd")
    partial = ByHand().hypergradient(replace(case, nested=False), method)()
    assert difference(betty.hypergradient(case, method)(), partial) < 1e-9
    assert difference(dense_hypergradient(case.stages), case.exact()) > 0.01
    assert difference(Ours().hypergradient(case, Method("cg", 20))(), case.exact()) < 1e-8
    assert "its own loss reads" in Ours().refuses(case, method)
    assert "above" in betty.refuses(case, Method("cg", 20))


def test_dense_solves_of_torchopt_keep_the_diagonal_blocks_only():
    torchopt = installed(LIBRARIES["torchopt"])
    assert compared(torchopt, "ridge 50", "dense") < SAME  # one tensor, one block
    assert compared(torchopt, "logistic breast-cancer", "dense") > 1e-2  # a matrix and a vector, coupled


class _Tolerant(Boat):
    tolerance = 1e-10  # BOAT's default


def test_conjugate_gradients_of_boat_return_the_iterate_before_the_one_that_converged():
    """With a Hessian 2I they converge in their first step, and what is returned is zero."""
    installed(LIBRARIES["boat"])
    case = case_of("ridge 50")
    lower, upper = case.stages

    def round_loss(own, others, batch):
        w, x = own.params["w"], others["penalties"].params["log"]
        return w.square().sum() - w @ x

    case = replace(case, stages=(replace(lower, loss=round_loss), upper))
    ours = Ours().hypergradient(case, Method("cg", 3))()
    assert difference(_Tolerant().hypergradient(case, Method("cg", 3))(), ours) == 1
    assert difference(Boat().hypergradient(case, Method("cg", 1))(), ours) < SAME


def test_boat_turns_a_loss_that_is_not_a_number_into_a_hypergradient_of_zero():
    boat = installed(LIBRARIES["boat"])
    case = case_of("ridge 50")
    lower, upper = case.stages

    def lost(own, others, batch):
        return upper.loss(own, others, batch) * float("nan")

    case = replace(case, stages=(lower, replace(upper, loss=lost)))
    found = boat.hypergradient(case, Method("neumann", 3))()
    assert not found["log"].any()


# --- training -------------------------------------------------------------------------------------------------


def weights_after(library, case, method, steps, monkeypatch):
    """The weights of all stages after some steps, as the metric sees them."""
    seen = {}

    def metric(self, modules):
        seen.update({(n, k): p.detach().clone() for n, m in modules.items() for k, p in m.named_parameters()})
        return 0.0

    monkeypatch.setattr(Case, "metric", metric)
    training = library.training(case, method)
    for _ in range(steps):
        training.step()
    training.metric()
    return seen


@pytest.mark.parametrize(
    ("problem", "method"),
    [
        ("ridge 50", "fd"),  # ten steps, Adam above
        ("logistic breast-cancer", "neumann:3"),  # momentum
        ("reweighting digits", "fd"),  # other batches at each step
        ("chain last-4", "fd"),
        ("chain dense-4", "neumann:3"),
    ],
)
def test_training_of_betty(problem, method, monkeypatch):
    betty, case, method = installed(LIBRARIES["betty"]), case_of(problem), Method.parse(method)
    theirs, ours = (weights_after(library, case, method, 3, monkeypatch) for library in (betty, Ours()))
    start = {(s.name, k): p.detach() for s in case.stages for k, p in s.beginning().named_parameters()}
    for key, value in ours.items():
        assert (theirs[key] - value).norm() < SAME * value.norm(), key
        assert not torch.equal(value, start[key]), key


def test_schedules_that_betty_does_not_have():
    """Betty repeats the steps of a chain's first stage for each step of the second."""
    betty = installed(LIBRARIES["betty"])
    case = case_of("chain last-2")
    repeated = replace(case, stages=tuple(replace(s, steps=2) for s in case.stages))
    assert betty.training(repeated, Method("fd")) is None
    assert betty.training(case, Method("fd")) is not None


# --- refusals, missing libraries, silence ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "problem", "method", "reason"),
    [
        (Betty(), "ridge 50", "gmres:3", "betty has no gmres"),
        (Betty(), "ridge 50", "unroll:3", "_fp16"),
        (TorchOpt(), "ridge 50", "fd", "torchopt has no fd"),
        (TorchOpt(), "chain last-2", "cg:3", "two levels"),
        (Higher(), "ridge 50", "cg:3", "higher has no cg"),
        (Boat(), "ridge 50", "dense", "boat has no dense"),
        (Boat(), "reweighting digits", "unroll:3", "one batch"),
        (JAXopt(), "ridge 50", "neumann:3", "jaxopt has no neumann"),
        (JAXopt(), "chain last-2", "cg:3", "only ridge and logistic"),
    ],
)
def test_refusals_say_why(library, problem, method, reason):
    assert reason in library.refuses(case_of(problem), Method.parse(method))


@pytest.mark.parametrize("library", [*LIBRARIES.values(), JAXopt()], ids=lambda library: library.name)
def test_a_missing_library_says_how_to_install_it(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library.module, None)
    assert library.install in library.unavailable()


def test_betty_prints_nothing(capfd):
    betty = installed(LIBRARIES["betty"])
    betty.hypergradient(case_of("chain last-2"), Method("fd"))()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
