"""What a loss sees of weights that a central difference has shifted."""

import numpy as np
import pytest
import torch

import mlo
from tests.levels import Holder, pull, two_levels

DIRECTIONAL = [
    mlo.FiniteDifference(scale=0.5),
    mlo.Identity(scale=0.5, product=mlo.CentralDifferences()),
    mlo.Identity(scale=0.5, product=mlo.ForwardOverReverse()),
    mlo.Identity(scale=0.5),
]


@pytest.mark.parametrize("decay", [1.0, 1e-5, 0.0])
@pytest.mark.parametrize("own", [lambda p: p.module.parameters(), lambda p: p.params.values()])
@pytest.mark.parametrize("method", DIRECTIONAL)
@pytest.mark.filterwarnings("error::mlo.MloWarning")
def test_a_penalty_on_what_needs_a_gradient(method, own, decay):
    """A filter as in many training scripts: shifted weights must pass it too, however small the penalty."""

    def low_loss(p, _):
        loss = 0.5 * (p.params["w"] - 1).square().sum()
        for q in own(p):
            if q.requires_grad:
                loss = loss + p.deps.top.params["w"].sum() * q.square().sum()
        return loss

    engine = two_levels(low_loss, low=Holder(2.0, 3.0), top=Holder(decay), method=method)
    for _ in range(5):  # c = w: −½ Σ 2 w c
        assert engine.hypergradient("top")["w"].item() == pytest.approx(-13.0, rel=1e-6)


@pytest.mark.parametrize("method", [DIRECTIONAL[0], DIRECTIONAL[1], DIRECTIONAL[3]])
def test_a_gradient_taken_inside_the_loss(method):
    def low_loss(p, _):
        w = p.params["w"]
        (slope,) = torch.autograd.grad((w**3).sum() / 3, w, create_graph=True)  # w²
        return 0.5 * w.square().sum() - (slope * p.deps.top.params["w"]).sum()

    engine = two_levels(low_loss, low=Holder(2.0, 3.0), method=method)
    for _ in range(4):  # ∂²L/∂x∂w = −2 w, and c = w
        assert engine.hypergradient("top")["w"].tolist() == pytest.approx([4.0, 9.0], rel=1e-6)


def test_weights_shifted_under_autocast_are_cast_anew():
    """A cache of casts knows weights that need a gradient by their place, and not by what was written there."""
    w, x, inputs = torch.randn(13, 4, dtype=torch.float32).split([4, 4, 5])
    x = x.clone().requires_grad_()

    def loss(w, x):
        return 0.5 * ((inputs @ w).float() - (inputs @ x).float()).square().mean()

    found = {}
    for name, method in {
        "exact": mlo.Identity(scale=0.5),
        "fd": mlo.FiniteDifference(scale=0.5, epsilon=1.0),
        "products": mlo.Identity(scale=0.5, product=mlo.CentralDifferences(epsilon=1.0)),
        "solved": mlo.Neumann(terms=2, scale=0.5, product=mlo.CentralDifferences(epsilon=1.0)),
        "solved exactly": mlo.Neumann(terms=2, scale=0.5),
    }.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = mlo.best_response(loss, w, x, method).sum()
        found[name] = torch.autograd.grad(total, x)[0]
    for name, reference in {"fd": "exact", "products": "exact", "solved": "solved exactly"}.items():
        assert (found[name] - found[reference]).norm() < 0.05 * found[reference].norm()


def test_the_graph_in_the_shifted_weights_is_made_only_where_it_is_asked_for():
    flags = []

    def low_loss(p, _):
        flags.append(p.params["w"].requires_grad)
        return pull(p, _)

    engine = two_levels(low_loss, method=mlo.FiniteDifference(scale=0.5))
    seen = []
    for _ in range(4):
        flags.clear()
        engine.hypergradient("top")
        seen.append(tuple(flags))
    assert seen[0] == (True, True)  # not known yet
    assert seen[1][:4] == (True, False, False, False)  # the loss is compared with itself, and then both sides
    assert seen[2] == seen[3] == (False, False)
    x = torch.ones(2, requires_grad=True)
    flags.clear()

    def loss(w, x):
        flags.append(w.requires_grad)
        return (w - x).square().sum()

    w = mlo.best_response(loss, torch.ones(2), x, mlo.FiniteDifference(scale=0.5))
    w.sum().backward()
    assert flags == [True, True]


def test_numbers_drawn_late_are_found_at_every_later_difference():
    """A difference that was found to be one of two functions makes the next one be looked at as well."""
    rng, noisy = np.random.default_rng(0), []

    def low_loss(p, _):
        draw = rng.random() if noisy else 0.5
        return (p.params["w"] - draw * p.deps.top.params["w"]).square().sum()

    engine = two_levels(low_loss, method=mlo.FiniteDifference(scale=0.5))
    for _ in range(3):
        engine.step()
    noisy.append(True)
    for _ in range(4):
        with pytest.raises(mlo.EvaluationError, match="and then"):
            engine.step()
