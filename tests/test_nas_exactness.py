"""The hypergradients of an interleaving search: against re-solving, against the DARTS paper, and what they cost."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mlo
from examples.nas_interleaving.algorithms import build_engine
from examples.nas_interleaving.exactness import __main__ as command
from examples.nas_interleaving.exactness.comparison import METHODS, Comparison, trained
from examples.nas_interleaving.exactness.reference import Solved, place, solve, weights_of
from examples.nas_interleaving.exactness.smooth import Smoothed, smooth_search, stages_of
from examples.nas_interleaving.passes import PassCounter
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.stages import ARCHITECTURE
from examples.nas_interleaving.tasks import load_tasks
from mlo.bench.measure.memory import peak_bytes

TINY = SearchSettings(
    tasks=("digits:0-1", "digits:2-3"), channels=2, nodes=2, batch_size=8, warmup=0, schedule="constant", grad_clip=0.0
)


@pytest.fixture(scope="module")
def solved():
    """The problems of the smooth search, and the exact hypergradient along three directions."""
    with Smoothed():
        problems = smooth_search(rounds=1)
        trained(problems, {100})  # as the command does
        size = sum(p.numel() for p in problems[-1].module.parameters())
        directions, _ = torch.linalg.qr(
            torch.randn(size, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        )
        return problems, solve(problems, directions)


def test_what_converges_gives_the_exact_hypergradient(solved):
    problems, exact = solved
    with Smoothed():
        comparison = Comparison(problems, exact, {})
        for name in ("Dense", "ConjugateGradient", "MINRES"):
            found = comparison.measure(METHODS[name])
            assert found.error < 1e-6, name
            assert not found.broken


def test_the_errors_of_the_approximations_are_those_of_the_page(solved):
    """Along all directions, the share of the exact hypergradient by Dense, which the test above has compared."""
    problems, exact = solved
    with Smoothed():
        place(problems, exact.weights)
        for stage in stages_of(problems):
            stage.hypergradient, stage.steps = mlo.Dense(), 1
        gradient = mlo.Engine(problems).hypergradient(ARCHITECTURE)
        joined = torch.cat([g.flatten() for g in gradient.values()])
        comparison = Comparison(problems, replace(exact, slopes=joined, directions=torch.eye(len(joined))), {})
        expected = {  # cosine, relative error, passes forward and reverse
            "no response (first order)": (0.8369, 0.88, 2, 2),
            "one step, differences (the paper)": (0.8396, 0.82, 6, 6),
            "FiniteDifference": (0.8396, 0.82, 6, 6),
            "Identity": (0.8396, 0.82, 4, 6),
            "Unroll, 20 steps": (0.9062, 0.44, 72, 112),
            "Neumann, 20 terms": (0.9062, 0.44, 4, 44),
            "ConjugateGradient, 5 steps": (0.9157, 0.43, 4, 16),
        }
        for name, (cosine, error, forward, reverse) in expected.items():
            found = comparison.measure(METHODS[name])
            assert found.cosine == pytest.approx(cosine, abs=2e-4), name
            assert found.error == pytest.approx(error, abs=6e-3), name
            assert (found.forward, found.reverse) == (forward, reverse), name


def test_unrolling_is_measured_after_the_steps_that_it_goes_back():
    with Smoothed():
        problems = smooth_search(rounds=1)
        at = trained(problems, {0, 4, 5})
        kept = {n: {name: w.clone() for name, w in weights.items()} for n, weights in at.items()}
        place(problems, at[4])
        for stage in stages_of(problems):
            stage.hypergradient = mlo.StopGradient()
        engine = mlo.Engine(problems)
        engine.step()
        for name, weights in weights_of(problems).items():
            torch.testing.assert_close(weights, at[5][name], rtol=1e-12, atol=0)
        exact = Solved(at[5], torch.ones(1), torch.eye(32)[:, :1])
        comparison = Comparison(problems, exact, at)
        assert comparison.measure(mlo.Unroll(steps=5), 5) is not None
        assert comparison.measure(mlo.Unroll(steps=5), 4) is None
        # Five steps in a row: the second learner then follows one that has already taken its own.
        first, second = (stage.name for stage in stages_of(problems))
        torch.testing.assert_close(weights_of(problems)[first], at[5][first], rtol=1e-12, atol=0)
        assert not torch.equal(weights_of(problems)[second], at[5][second])
        torch.testing.assert_close(at, kept, rtol=0, atol=0)


def test_the_networks_of_the_comparison_have_no_kinks():
    x = torch.linspace(-1, 1, 36).view(1, 1, 6, 6)
    with Smoothed():
        relu, pool = nn.ReLU()(x), nn.MaxPool2d(3, stride=1, padding=1)(x)
        norm = nn.BatchNorm2d(1, affine=False, track_running_stats=False)(x)
    torch.testing.assert_close(relu, torch.log1p((4 * x).exp()) / 4)
    window = x[0, 0, 1:4, 2:5]
    torch.testing.assert_close(pool[0, 0, 2, 3], window.exp().mean().log())
    torch.testing.assert_close(norm, (x - x.mean()) / (x.var(correction=0) + 0.1).sqrt())


def test_the_command_prints_a_table(monkeypatch, capsys):
    def as_it_is(problems):
        return Solved(weights_of(problems), torch.ones(2), torch.eye(32)[:, [2, 3]])

    few = {name: METHODS[name] for name in ("no response (first order)", "Unroll, 5 steps")}
    monkeypatch.setattr(command, "METHODS", few)
    monkeypatch.setattr(command, "solve", as_it_is)
    assert command.main(["--steps", "1", "6"]) == 0
    printed = capsys.readouterr().out
    assert "K = 2, M = 1, λ = 1: 2 stages of 300 weights, seed 0" in printed
    number = r"-?[\d.]+(?:e[-+]\d+)?"
    assert re.search(rf"\n\| no response .* \| 2 \+ 2 \|(?: {number}, {number} \|){{3}}\n", printed)
    assert re.search(
        rf"\n\| Unroll, 5 steps \| 16 \+ 26 \| {number}, {number} \| – \| {number}, {number} \|\n", printed
    )


# --- the formula of the DARTS paper ---


def _losses(problem, images, labels, weights, alphas):
    """Return the loss of a learner's network with given weights and architecture."""
    scores = torch.func.functional_call(problem.module, weights, (images, alphas))
    return F.cross_entropy(scores, labels)


def _gradient(loss, at):
    return dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))


def _leaves(values):
    return {name: value.detach().clone().requires_grad_() for name, value in values.items()}


# Ties in the images' background are kinks at the very weights, of which the engine warns; both sides have them.
@pytest.mark.filterwarnings("ignore:.*many kinks at the very weights")
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 3e-4)])
def test_one_learner_one_round_one_step_is_the_second_order_formula_of_darts(momentum, decay):
    """Equations 7 and 8 of Liu et al. (ICLR 2019), with w' as their unrolled model makes it: SGD with its momentum."""
    settings = replace(TINY, tasks=("digits:0-3",), rounds=1, momentum=momentum, weight_decay=decay)
    problems = list(build_engine(load_tasks(settings.tasks), settings).problems.values())
    stage = problems[0]
    stage.hypergradient = mlo.Unroll(steps=1, product=mlo.CentralDifferences(epsilon=0.01))
    engine = mlo.Engine(problems)
    engine.run(2)  # so that there is momentum
    alphas = _leaves(dict(problems[1].module.named_parameters()))
    before = _leaves(dict(stage.module.named_parameters()))
    buffers = {n: stage.optimizer.state[p].get("momentum_buffer") for n, p in stage.module.named_parameters()}
    velocity = {n: torch.zeros_like(before[n]) if b is None else b.clone() for n, b in buffers.items()}
    problems[1].warmup = 3  # the architecture stays where it is, for the sake of the comparison
    engine.step()
    found = engine.hypergradient(ARCHITECTURE)

    train = engine._members[stage.name].micro_batches[0][0]
    (held_out,) = engine._members[ARCHITECTURE].micro_batches[0][0]
    rate = settings.learning_rate
    gradient = _gradient(_losses(stage, *train, before, alphas), before)
    moved = _leaves({n: w - rate * (momentum * velocity[n] + gradient[n] + decay * w) for n, w in before.items()})
    for name, p in stage.module.named_parameters():
        torch.testing.assert_close(p, moved[name], rtol=1e-12, atol=1e-14, check_dtype=True)
    loss = _losses(stage, *held_out, moved, alphas)
    both = _gradient(loss, {**alphas, **moved})
    vector = {n: both[n] for n in moved}
    shift = 0.01 / torch.cat([v.flatten() for v in vector.values()]).norm()
    sides = [
        _gradient(_losses(stage, *train, {n: w + sign * shift * vector[n] for n, w in before.items()}, alphas), alphas)
        for sign in (1, -1)
    ]
    for name in alphas:
        implicit = rate * (sides[0][name] - sides[1][name]) / (2 * shift)
        torch.testing.assert_close(found[name], both[name] - implicit, rtol=1e-9, atol=1e-12)
        assert implicit.norm() > 1e-3 * both[name].norm(), "the second order must not vanish beside the first"


# --- what a step costs ---

#: Passes through the network of each stage: its training step, and its share of the hypergradient.
PASSES = {
    "two gradients": (mlo.FiniteDifference(), 1 + 2, 1 + 2),
    "two gradients beside the step's own": (mlo.Unroll(steps=1, product=mlo.CentralDifferences()), 1 + 2, 1 + 2),
    "one gradient, and one pass through its graph": (mlo.Identity(scale=None), 1 + 1, 1 + 2),
    "four products more": (mlo.Neumann(terms=5), 1 + 1, 1 + 2 + 4),
    "none": (mlo.StopGradient(), 1, 1),
}


@pytest.mark.filterwarnings("ignore:.*many kinks at the very weights", "ignore::mlo.BreakdownWarning")
@pytest.mark.parametrize(("learners", "rounds"), [(1, 1), (2, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("name", PASSES)
def test_a_step_of_the_search_makes_the_passes_that_its_method_needs(name, learners, rounds):
    method, forward, reverse = PASSES[name]
    tasks = ("digits:0-1", "digits:2-3", "digits:4-5")[:learners]
    engine = _engine(method, replace(TINY, tasks=tasks, rounds=rounds))
    engine.run(2)  # in the second one, differences are checked once
    counter = PassCounter()
    counter.attach(stage.module for stage in stages_of(list(engine.problems.values())))
    engine.step()
    stages = learners * rounds
    upper = learners  # the validation loss of each learner in the last round
    assert counter.counts() == {"forward": forward * stages + upper, "reverse": reverse * stages + upper}


def _engine(method, settings):
    problems = list(build_engine(load_tasks(settings.tasks), settings).problems.values())
    for stage in stages_of(problems):
        stage.hypergradient = method
    return mlo.Engine(problems)


@pytest.mark.filterwarnings("ignore:.*many kinks at the very weights")
@pytest.mark.parametrize("method", [mlo.FiniteDifference(), mlo.Identity(scale=None)])
def test_memory_grows_with_the_stages_by_their_weights_alone(method):
    peaks = {}
    for rounds in (1, 2, 4):
        engine = _engine(method, replace(TINY, rounds=rounds, batch_size=64))
        engine.step()
        peaks[rounds] = peak_bytes(engine.step, torch.device("cpu"))
    (stage, *_) = stages_of(list(engine.problems.values()))
    weights = sum(p.numel() * p.element_size() for p in stage.module.parameters())
    for fewer, more in ((1, 2), (2, 4)):
        stages = len(TINY.tasks) * (more - fewer)
        assert peaks[more] - peaks[fewer] <= 4 * stages * weights
        assert peaks[fewer] > 20 * weights, "activations must outweigh the weights, or nothing is seen"
