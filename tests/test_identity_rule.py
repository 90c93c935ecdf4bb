"""`Identity` forms g and its mixed product together, where nobody has rules of their own."""

import pytest
import torch
from torch import nn

import mlo


class Lower(mlo.Problem):
    """w*(x) = x / 2, and H = 2."""

    depends = True

    def training_step(self, batch):
        w, x = self.params["w"], self.deps.upper.params["x"]
        return (w.square() - w * x).sum() if self.depends else x.square().sum()


class Upper(mlo.Problem):
    def training_step(self, batch):
        return self.deps.lower.params["w"].sum() + self.params["x"].sum()


def hypergradient(method, depends=True):
    low, top = nn.ParameterDict({"w": torch.ones(2)}), nn.ParameterDict({"x": torch.ones(2)})
    lower = Lower("lower", low, depends_on=["upper"], hypergradient=method)
    lower.depends = depends
    return mlo.Engine([lower, Upper("upper", top, depends_on=["lower"])]).hypergradient("upper")["x"]


@pytest.mark.parametrize("product", [mlo.DoubleBackward(), mlo.CentralDifferences()])
def test_a_stage_that_reaches_none_of_its_parameters_is_an_error(product):
    with pytest.raises(mlo.LossError, match="does not depend on any of the parameters"):
        hypergradient(mlo.Identity(scale=0.5, product=product), depends=False)


def test_products_and_solves_of_one_s_own_are_used():
    class Doubled(mlo.DoubleBackward):
        def linearised(self, *arguments):
            span = super().linearised(*arguments)
            theirs = span.__enter__

            class Span:
                def __enter__(self):
                    found = theirs()
                    product = found.mixed_product
                    found.mixed_product = lambda v: [2 * t for t in product(v)]
                    return found

                def __exit__(self, *error):
                    return span.__exit__(*error)

            return Span()

    class Settled(mlo.Identity):
        def solve_and_settle(self, stage, system):
            return tuple(3 * t for t in super().solve_and_settle(stage, system))

    class Solved(mlo.Identity):
        def solve(self, system):
            found = super().solve(system)
            return type(found)(tuple(4 * t for t in found.vector), found.status, 0, None)

    for method, times in (
        (mlo.Identity(scale=0.5), 1),
        (mlo.Identity(scale=0.5, product=Doubled()), 2),
        (Settled(scale=0.5), 3),
        (Solved(scale=0.5), 4),
    ):
        torch.testing.assert_close(hypergradient(method), torch.full((2,), 1 + 0.5 * times), rtol=1e-12, atol=0)
