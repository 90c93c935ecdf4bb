"""Reverse passes past torch's tests of their arguments: the same as torch's own."""

import pytest
import torch

from mlo import reverse_pass as module
from mlo.bench.measure.passes import reverse_passes
from mlo.reverse_pass import accumulate, reverse_pass


@pytest.fixture(params=[True, False], ids=["direct", "public"])
def known(request, monkeypatch):
    """Both ways: with the place where torch's reverse passes begin, and as if it were missing."""
    monkeypatch.setattr(module, "_KNOWN", request.param)
    return request.param


def two_outputs():
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    unused = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    return (a, b, unused), (a**3 * b, (a.sum() * b**2).sum())


def test_gradients_with_cotangents_are_those_of_torch(known):
    inputs, outputs = two_outputs()
    cotangents = (torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64))
    expected = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True)
    found = reverse_pass(outputs, inputs, cotangents)
    assert found[2] is None is expected[2]
    assert all(torch.equal(f, e) for f, e in zip(found[:2], expected[:2], strict=True))


def test_scalars_need_no_cotangents(known):
    (a, b, _), (_, scalar) = two_outputs()
    found = reverse_pass((scalar,), (a, b))
    assert found[0].tolist() == [0.25] * 3
    assert found[1].item() == 6.0  # 2 b Σ a


def test_a_graph_is_freed_kept_or_made_as_asked(known):
    (a, b, _), (cubes, _) = two_outputs()
    ones = torch.ones(3, dtype=torch.float64)
    first = reverse_pass((cubes,), (a,), (ones,), create_graph=True)[0]  # 3 a² b
    assert torch.equal(reverse_pass((first,), (b,), (ones,), retain_graph=True)[0], (3 * a.detach() ** 2).sum()[None])
    again = reverse_pass((first,), (a,), (ones,))[0]
    assert torch.equal(again, 6 * a.detach() * 0.5)
    with pytest.raises(RuntimeError, match="a second time"):
        reverse_pass((first,), (a,), (ones,))


@pytest.mark.parametrize("shape", [(5, 3), (2,), (1,)])
def test_a_cotangent_of_another_shape_is_an_error(known, shape):
    """Torch's engine alone would add up the rows of one that has too many."""
    (a, _, _), (cubes, _) = two_outputs()
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        reverse_pass((cubes,), (a,), (torch.ones(shape, dtype=torch.float64),))


def test_accumulating_adds_to_grad_of_the_inputs_alone(known):
    (a, b, _), (_, scalar) = two_outputs()
    a.grad = torch.ones_like(a)
    accumulate(scalar, [a])
    assert a.grad.tolist() == [1.25] * 3
    assert b.grad is None


def test_what_overrides_torch_s_functions_is_asked():
    seen = []

    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    a = torch.tensor([1.0, 2.0]).as_subclass(Watching).requires_grad_()
    loss = (a**2).sum()
    seen.clear()
    assert reverse_pass((loss,), (a,))[0].tolist() == [2.0, 4.0]
    assert torch.autograd.grad in seen
    loss = (a**2).sum()
    seen.clear()
    accumulate(loss, [a])
    assert a.grad.tolist() == [2.0, 4.0]


def test_passes_are_counted(known):
    def call():
        (a, _, _), (_, scalar) = two_outputs()
        reverse_pass((scalar,), (a,), retain_graph=True)
        accumulate(scalar, [a])

    assert reverse_passes(call) == 2
