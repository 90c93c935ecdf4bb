"""The order of optimizer steps in one step of the engine, as the design gives it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mlo


class Recorded(mlo.Problem):
    """A strongly convex stage that pulls towards everything it reads, and notes its optimizer steps."""

    def __init__(self, name, log, reads=(), optimizer=True, **options):
        module = nn.ParameterDict({"w": torch.randn(2)})
        given = torch.optim.SGD(module.parameters(), lr=0.1) if optimizer else None
        if given is not None:
            given.register_step_post_hook(lambda *_: log.append(name))
        super().__init__(name, module, optimizer=given, depends_on=reads, **options)

    def training_step(self, batch):
        w = self.params["w"]
        loss = (w**2).sum()
        for d in self.depends_on:
            loss = loss + 0.2 * ((w - self.deps[d].params["w"]) ** 2).sum()
        return loss


def order(*definitions, steps=1):
    """The optimizer steps of the last of `steps` engine steps; a definition is (name, reads[, options])."""
    log = []
    engine = mlo.Engine(
        [Recorded(name, log, reads, **(options[0] if options else {})) for name, reads, *options in definitions]
    )
    for _ in range(steps):
        log.clear()
        engine.step()
    return " ".join(log)


@pytest.mark.parametrize("steps", [1, 2])  # the second engine step does the same as the first
class TestOrder:
    def test_two_levels(self, steps):
        assert order(("w", ["x"]), ("x", ["w"]), steps=steps) == "w x"

    def test_several_steps_at_both_levels(self, steps):
        assert order(("w", ["x"], {"steps": 3}), ("x", ["w"], {"steps": 2}), steps=steps) == "w w w x w w w x"

    def test_chain_of_four_under_one_upper_problem(self, steps):
        chain = [("w1", ["top"]), ("w2", ["w1", "top"]), ("w3", ["w2", "top"]), ("w4", ["w3", "top"])]
        assert order(*chain, ("top", ["w4"]), steps=steps) == "w1 w2 w3 w4 top"

    def test_chain_whose_upper_problem_reads_all(self, steps):
        chain = [("w1", ["top"]), ("w2", ["w1", "top"]), ("w3", ["w2", "top"])]
        assert order(*chain, ("top", ["w1", "w2", "w3"]), steps=steps) == "w1 w2 w3 top"

    def test_three_nested_levels(self, steps):
        levels = [("l3", ["l2", "l1"]), ("l2", ["l3", "l1"], {"steps": 2}), ("l1", ["l2", "l3"])]
        assert order(*levels, steps=steps) == "l3 l2 l3 l2 l3 l1"

    def test_four_nested_levels(self, steps):
        levels = [
            ("l4", ["l3", "l2", "l1"]),
            ("l3", ["l4", "l2", "l1"], {"steps": 2}),
            ("l2", ["l3", "l4", "l1"], {"steps": 2}),
            ("l1", ["l2", "l3", "l4"]),
        ]
        solve3 = "l4 l3 l4 l3"
        assert order(*levels, steps=steps) == f"{solve3} l4 l2 {solve3} l4 l2 {solve3} l4 l1"

    def test_diamond(self, steps):
        graph = [("base", ["top"]), ("left", ["base"]), ("right", ["base"]), ("top", ["left", "right"])]
        assert order(*graph, steps=steps) == "base right left top"

    def test_two_upper_problems_that_take_each_other_as_given(self, steps):
        graph = [("w", ["a", "b"]), ("a", ["w"]), ("b", ["w"], {"constants": ["a"]})]
        assert order(*graph, steps=steps) == "w a w b"

    def test_two_upper_problems_led_by_one(self, steps):
        graph = [("w", ["a", "b"]), ("a", ["w"]), ("b", ["w", "a"])]
        assert order(*graph, steps=steps) == "w a w b"

    def test_two_upper_problems_led_by_one_with_more_steps_of_the_follower(self, steps):
        graph = [("w", ["a", "b"]), ("a", ["w"], {"steps": 2}), ("b", ["w", "a"])]
        assert order(*graph, steps=steps) == "w a w a w b"

    def test_a_pair_that_reads_each_other(self, steps):
        assert order(("a", ["b"], {"steps": 2}), ("b", ["a"]), steps=steps) == "a a b"

    def test_a_stage_that_depends_on_nothing_is_solved_once_per_engine_step(self, steps):
        graph = [("free", []), ("w", ["free", "x"]), ("x", ["w", "free"], {"steps": 2})]
        assert order(*graph, steps=steps) == "free w x w x"

    def test_a_problem_without_optimizer_still_has_its_dependencies_made_fresh(self, steps):
        assert order(("w", ["x"], {"steps": 2}), ("x", ["w"], {"optimizer": False}), steps=steps) == "w w"


def test_an_upper_problem_in_warm_up():
    log = []
    engine = mlo.Engine([Recorded("w", log, ["x"], steps=2), Recorded("x", log, ["w"], warmup=2, hypergradient=None)])
    outcomes = [engine.step()["x"].outcome for _ in range(3)]
    assert " ".join(log) == "w w w w w w x"
    assert outcomes == ["warm-up", "warm-up", "stepped"]


def test_a_middle_problem_in_warm_up():
    log = []
    levels = [
        Recorded("l3", log, ["l2", "l1"]),
        Recorded("l2", log, ["l3", "l1"], steps=2, warmup=1),
        Recorded("l1", log, ["l2", "l3"]),
    ]
    engine = mlo.Engine(levels)
    engine.step()
    assert " ".join(log) == "l3 l1"
    log.clear()
    engine.step()
    assert " ".join(log) == "l3 l2 l3 l2 l3 l1"


def test_reports_tell_what_each_problem_did():
    log = []
    engine = mlo.Engine([Recorded("w", log, ["x"], steps=3), Recorded("x", log, ["w"], optimizer=False)])
    reports = engine.step()
    assert (reports["w"].outcome, reports["w"].steps) == ("stepped", 3)
    assert (reports["x"].outcome, reports["x"].steps, reports["x"].loss) == ("no optimizer", 0, None)
    w, x = (engine.problems[n].module["w"].detach() for n in "wx")
    assert reports["w"].loss == pytest.approx(_loss_before_last_step(w, x))


def _loss_before_last_step(w, x):
    # w after the step is w − 0.1·(2w + 0.4(w − x)).
    before = (w - 0.04 * x) / 0.76
    return ((before**2).sum() + 0.2 * ((before - x) ** 2).sum()).item()
