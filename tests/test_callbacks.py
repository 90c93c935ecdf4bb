"""The callbacks that come with the library."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import mlo
import mlo.callbacks
from tests import zoo


class Lower(mlo.Problem):
    """c w² − w x: positive definite or negative, as c is."""

    curvature = 1.0

    def training_step(self, batch):
        w = self.params["w"]
        return {"loss": (self.curvature * w**2 - w * self.deps.upper.params["x"]).sum(), "largest": w.abs().max()}


class Upper(mlo.Problem):
    def training_step(self, batch):
        return self.deps.lower.params["w"].square().sum()

    def validation_step(self):
        return {"sum": self.deps.lower.params["w"].sum()}


def small_engine(curvature=1.0, policy="warn"):
    low, top = (nn.ParameterDict({name: torch.ones(2)}) for name in "wx")
    lower = Lower(
        "lower",
        low,
        optimizer=torch.optim.SGD(low.parameters(), lr=0.25),
        depends_on=["upper"],
        steps=2,
        hypergradient=mlo.ConjugateGradient(on_breakdown=policy),
    )
    lower.curvature = curvature
    sgd = torch.optim.SGD(top.parameters(), lr=0.1)
    return mlo.Engine([lower, Upper("upper", top, optimizer=sgd, depends_on=["lower"])])


def test_every_figure_of_a_solve_is_in_the_log(caplog):
    caplog.set_level(logging.INFO, "mlo")
    reports = small_engine().run(3, validate_every=3, callbacks=[mlo.callbacks.Logger()])
    assert [r.levelno for r in caplog.records] == [logging.INFO] * 9
    lower, upper, solve = caplog.records[-3:]
    # w goes from 1 half the way to x / 2 at each step: x stays near 1
    assert lower.message.startswith("step 3, lower: stepped, steps 2, loss ")
    assert f", largest {reports['lower'].metrics['largest']:.4g}" in lower.message
    assert upper.message.startswith("step 3, upper: stepped, steps 1, loss ")
    assert upper.message.endswith(f", validation sum {reports['upper'].validation['sum']:.4g}")
    summary = reports["upper"].solves["upper/lower"]
    assert solve.message == (
        f"step 3, upper/lower: 1 CONVERGED, products 1, iterations 1, residual {summary.worst_residual:.3g}, "
        f"gradient norm {summary.gradient_norm:.4g}"
    )
    assert (solve.step, solve.path, solve.summary) == (3, "upper/lower", summary)
    assert (upper.step, upper.report) == (3, reports["upper"])


@pytest.mark.parametrize(("policy", "outcome"), [("warn", "stepped"), ("skip", "skipped")])
@pytest.mark.filterwarnings("ignore::mlo.BreakdownWarning")
def test_breakdowns_are_warnings_with_their_remedy_at_every_step(caplog, policy, outcome):
    caplog.set_level(logging.INFO, "mlo")
    small_engine(-1.0, policy).run(3, callbacks=[mlo.callbacks.Logger(every=2)])
    found = [(r.step, r.levelname, getattr(r, "path", None)) for r in caplog.records]
    broken = [(step, "WARNING", "upper/lower") for step in (1, 2, 3)]
    assert found == [broken[0], (2, "INFO", None), (2, "INFO", None), broken[1], broken[2]]
    assert caplog.records[2].message.startswith(f"step 2, upper: {outcome}, ")
    message = caplog.records[0].message
    assert "1 NEGATIVE_CURVATURE, products 1, iterations 0" in message
    assert message.endswith(f". {mlo.Status.NEGATIVE_CURVATURE.remedy}")


def test_a_level_that_is_off_costs_no_string(caplog, monkeypatch):
    from mlo.callbacks import logger

    caplog.set_level(logging.WARNING, "mlo")
    for name in ("_of_problem", "_of_solves"):
        monkeypatch.setattr(logger, name, None)
    small_engine().run(2, callbacks=[mlo.callbacks.Logger()])
    assert not caplog.records


def test_each_node_of_a_chain_is_named_by_its_path_and_idle_problems_are_left_out(caplog):
    caplog.set_level(logging.INFO, "some.name")
    stages, top = zoo.chain(mlo.ConjugateGradient(), length=3)
    engine = mlo.Engine([*stages, top])
    reports = engine.run(1, callbacks=[mlo.callbacks.Logger(logging.getLogger("some.name"))])
    assert {r.path for r in caplog.records if hasattr(r, "path")} == set(reports["top"].solves)
    assert len(reports["top"].solves) == 3
    caplog.clear()
    mlo.callbacks.Logger("some.name")(engine, {"top": mlo.ProblemReport("top")})
    assert not caplog.records


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlo.callbacks.Logger(3), r"Logger\(logger=3\): expected a logging.Logger, or the name of one"),
        (lambda: mlo.callbacks.Logger(""), r"Logger\(logger=''\): expected"),
        (lambda: mlo.callbacks.Logger(every=0), r"Logger\(every=0\): expected an integer of at least 1"),
    ],
)
def test_arguments_of_the_logger(make, message):
    with pytest.raises(mlo.ConfigurationError, match=message):
        make()
