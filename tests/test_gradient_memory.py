"""Who may write to gradients, cotangents and results: nothing that somebody else refers to is changed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import mlo
from mlo.bench.measure.memory import peak_bytes
from tests.levels import METHODS, Holder, Problem, two_levels


@pytest.mark.parametrize("base", [mlo.ConjugateGradient, mlo.Identity, mlo.FiniteDifference])
def test_a_rule_of_one_s_own_keeps_its_results(base):
    """Its subclass may hand out what it keeps, whatever its parent does with its own results."""
    kept = []

    class Keeping(base):
        def pullback(self, *arguments):
            result = super().pullback(*arguments)
            kept.append((result[0], result[0].clone()))
            return result

    class HandingOver(Keeping):
        hands_over = True

    assert (base.hands_over, Keeping.hands_over, HandingOver.hands_over) == (True, False, True)
    engine = two_levels(method=Keeping())
    engine.problems["top"].grad_clip = 1e-3
    engine.step()
    assert engine.problems["top"].module.w.grad.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert torch.equal(*kept[0])


def test_shifted_weights_take_the_memory_of_cotangents_that_nobody_keeps():
    class Keeping(mlo.FiniteDifference):
        def pullback(self, *arguments):  # may keep what it is given, for all that is known
            return super().pullback(*arguments)

    def built(method):
        low, top = Holder(*[0.0] * 10_000), Holder(0.5)
        engine = two_levels(low=low, top=top, method=method)
        engine.run(3)  # the symmetry of the derivatives is looked at once
        return engine

    copy_of_weights = 8 * 10_000
    engines = [built(kind(scale=0.5, epsilon=0.1)) for kind in (mlo.FiniteDifference, Keeping)]
    lean, kept = (peak_bytes(lambda e=e: e.hypergradient("top"), torch.device("cpu")) for e in engines)
    assert kept - lean == copy_of_weights
    for engine in engines:
        c = engine.problems["low"].module.w.detach()  # the cotangent; ∂²L/∂x∂w = −1 for each weight
        assert engine.hypergradient("top")["w"].item() == pytest.approx(0.5 * c.sum().item(), rel=1e-6)


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: torch.stack([a, b.view(4)]).sum(0),
        lambda a, b: (a[None] + b.view(1, 4))[0],
        lambda a, b: torch.cat([a, b.view(4)]).view(2, 4).sum(0),
    ],
)
def test_cotangents_that_lie_in_one_memory(join):
    """Torch hands out one memory twice here: to overwrite the first would change the second."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(2 * torch.ones(2, 2))

    def top_loss(p, _):
        low = p.deps.low.params
        return (join(low["a"], low["b"]) * torch.arange(1.0, 5.0)).sum()

    def low_loss(p, _):
        s, t = p.deps.top.params["w"]
        return s * p.params["a"].square().sum() + t * p.params["b"].pow(3).sum()

    engine = two_levels(low_loss, top_loss, low=Two(), method=mlo.FiniteDifference(scale=0.5, epsilon=1e-4))
    for _ in range(3):  # the second one is looked at more closely
        # c = (1, 2, 3, 4) for both: −½ (Σ 2 a c, Σ 3 b² c)
        assert engine.hypergradient("top")["w"].tolist() == pytest.approx([-10.0, -60.0], rel=1e-6)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradients_that_lie_in_one_memory(batches, clip):
    """What is added to one of them, or scales it, in place would change the other."""

    class Two(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.full((4,), a)), nn.Parameter(torch.full((2, 2), b))

    def top_loss(p, batch):
        one = (p.params["a"][None] + p.params["b"].view(1, 4))[0]
        low = p.deps.low.params
        other = (low["a"][None] + low["b"].view(1, 4))[0]
        return ((one + 10 * other) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum() * batch

    def low_loss(p, _):
        own, top = p.params, p.deps.top.params
        return 0.5 * ((own["a"] - top["a"]).square().sum() + (own["b"] - 2 * top["b"]).square().sum())

    lower = Problem("low", Two(1.0, 2.0), low_loss, depends_on=["top"], hypergradient=mlo.Identity())
    upper = Problem(
        "top",
        Two(1.0, 1.0),
        top_loss,
        depends_on=["low"],
        data=[0.5, 1.0, 1.5] if batches == 3 else [1.0],
        accumulate=batches,
        grad_clip=clip,
    )
    engine = mlo.Engine([lower, upper])
    a, b = 11 * torch.arange(1.0, 5.0), 21 * torch.arange(1.0, 5.0).view(2, 2)
    norm = math.hypot(a.norm().item(), b.norm().item())
    factor = 1.0 if clip is None else clip / norm
    for _ in range(3):
        report = engine.step()["top"]
        assert report.gradient_norm == pytest.approx(norm, rel=1e-12)
        assert torch.allclose(upper.module.a.grad, a * factor, rtol=1e-6, atol=0)
        assert torch.allclose(upper.module.b.grad, b * factor, rtol=1e-6, atol=0)
        found = engine.hypergradient("top")
        assert torch.allclose(found["a"], a, rtol=1e-12)
        assert torch.allclose(found["b"], b, rtol=1e-12)
        found["a"].zero_()
        assert torch.allclose(found["b"], b, rtol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradients_that_lie_in_one_memory_without_a_response(clip):
    module = nn.Module()
    module.a, module.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 2))
    slopes = torch.tensor([1.0, 2.0, 2.0, 4.0])

    def loss(p, _):
        return ((p.params["a"][None] + p.params["b"].view(1, 4))[0] * slopes).sum()

    engine = mlo.Engine([Problem("one", module, loss, grad_clip=clip)])
    found = engine.hypergradient("one")
    found["a"].zero_()
    assert torch.equal(found["b"].view(4), slopes)
    engine.step()
    clipped = slopes if clip is None else slopes * clip / math.sqrt(50.0)
    assert torch.allclose(module.a.grad, clipped, rtol=1e-6)
    assert torch.allclose(module.b.grad.view(4), clipped, rtol=1e-6)


def three_in_a_row(methods, lowest, **losses):
    """Stages `a` and `b`, of which b reads a, under `top`, which reads b."""
    losses = {
        "a": lambda p, _: 0.5 * (p.params["w"] - p.deps.top.params["w"]).square().sum(),
        "b": lambda p, _: 0.5 * (p.params["w"] - 3 * p.deps.a.params["w"]).square().sum(),
        "top": lambda p, _: 0.5 * p.deps.b.params["w"].square().sum(),
    } | losses
    return mlo.Engine(
        [
            Problem("a", lowest, losses["a"], depends_on=["top"], hypergradient=methods[0]),
            Problem("b", Holder(1.0, 2.0), losses["b"], depends_on=["a"], hypergradient=methods[1]),
            Problem("top", Holder(1.0, 2.0), losses["top"], depends_on=["b"]),
        ]
    )


def test_results_that_a_method_above_keeps_are_not_written_to():
    kept = []

    class Keeping(mlo.Identity):
        def pullback(self, *arguments):
            result = super().pullback(*arguments)
            kept.extend((r, r.clone()) for r in result)
            return result

    engine = three_in_a_row([mlo.FiniteDifference(scale=1.0), Keeping()], Holder(1.0, 2.0))
    for _ in range(4):
        assert engine.hypergradient("top")["w"].tolist() == pytest.approx([3.0, 6.0], rel=1e-6)
    assert len(kept) == 4
    assert all(torch.equal(r, before) for r, before in kept)


def test_shifted_weights_keep_the_layout_of_the_weights():
    lowest = nn.Module()
    lowest.w = nn.Parameter(torch.arange(6.0).view(2, 3).t())  # laid out by columns

    def a_loss(p, _):
        return 0.5 * (p.params["w"].t().view(6) - p.deps.top.params["w"].sum()).square().sum()

    def b_loss(p, _):
        return 0.5 * (p.params["w"] - p.deps.a.params["w"].contiguous().view(3, 2).sum(0)).square().sum()

    fd = mlo.FiniteDifference(scale=1.0)
    engine = three_in_a_row([fd, fd], lowest, a=a_loss, b=b_loss)
    for _ in range(4):  # (1, 2) for each of three rows
        assert engine.hypergradient("top")["w"].tolist() == pytest.approx([9.0, 9.0], rel=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_the_cotangents_of_a_caller_are_left_as_they_are(method):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    w = mlo.best_response(lambda w, x: (w - x).square().sum(), x.detach().clone(), x, method)
    cotangent = torch.tensor([3.0, -4.0])
    (found,) = torch.autograd.grad(w, x, cotangent)
    assert cotangent.tolist() == [3.0, -4.0]
    assert found.tolist() == pytest.approx([3.0, -4.0], rel=1e-6)


def test_a_rule_that_calls_others_keeps_its_cotangents():
    class Mean(mlo.HypergradientMethod):
        hands_over = True

        def pullback(self, *arguments):
            results = [m.pullback(*arguments) for m in (mlo.FiniteDifference(scale=0.5), mlo.Identity(scale=0.5))]
            return tuple((a + b) / 2 for a, b in zip(*results, strict=True))

    engine = two_levels(top_loss=lambda p, _: 10 * p.deps.low.params["w"].sum(), method=Mean())
    for _ in range(4):
        assert engine.hypergradient("top")["w"].tolist() == pytest.approx([5.0, 5.0], rel=1e-6)


def test_memory_that_is_not_torch_s_is_left_alone():
    array = np.array([1.0, 2.0])

    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.sum()

        @staticmethod
        def backward(ctx, g):
            return torch.from_numpy(array)

    kept = []

    def top_loss(p, _):
        kept.append(p.deps.low.params["w"])
        return Constant.apply(p.deps.low.params["w"])

    engine = two_levels(top_loss=top_loss, method=mlo.FiniteDifference(scale=1.0))
    for _ in range(4):
        assert engine.hypergradient("top")["w"].tolist() == pytest.approx([1.0, 2.0], rel=1e-6)
        assert array.tolist() == [1.0, 2.0]
        assert kept[-1].grad is None  # and not the shifted weights


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_gradients_in_a_compressed_layout():
    weight = nn.Module()
    weight.w = nn.Parameter(torch.eye(3).to_sparse_csr())
    one = Problem("one", weight, lambda p, _: torch.sparse.mm(p.params["w"], torch.ones(3, 1)).sum(), optimizer=None)
    found = mlo.Engine([one]).hypergradient("one")["w"]
    assert torch.equal(found.to_dense(), torch.eye(3))
