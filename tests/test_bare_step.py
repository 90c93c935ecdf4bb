"""Optimizer steps past torch's range for its profiler: everything that watches steps must still see them."""

import functools

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import mlo


class Fit(mlo.Problem):
    def training_step(self, batch):
        return (self.params["w"] - 3.0).square().sum()


def problem(optimizer=torch.optim.SGD, lr=0.25):
    module = torch.nn.ParameterDict({"w": torch.ones(2, dtype=torch.float64)})
    return Fit("fit", module, optimizer=optimizer(module.parameters(), lr=lr), steps=2)


def after_two_steps(fit):
    """w − 3 is halved in each of the two steps of w − lr·2 (w − 3)."""
    mlo.Engine([fit]).step()
    return fit.module["w"].tolist()


def test_without_a_watcher_there_is_no_range(monkeypatch):
    fit = problem()

    def refuse(name):
        raise AssertionError(name)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", refuse)
    assert after_two_steps(fit) == [2.5, 2.5]
    with pytest.raises(AssertionError, match=r"Optimizer\.step#SGD\.step"):
        fit.optimizer.step()


def test_a_profiler_sees_the_steps():
    fit = problem()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert after_two_steps(fit) == [2.5, 2.5]
    assert [e.count for e in profile.key_averages() if e.key == "Optimizer.step#SGD.step"] == [2]


@pytest.mark.parametrize("place", ["pre", "post", "global pre", "global post"])
def test_hooks_see_the_steps(place):
    fit = problem()
    seen = []

    def hook(optimizer, args, kwargs):
        seen.append(optimizer.param_groups[0]["params"][0].tolist())

    register = {
        "pre": fit.optimizer.register_step_pre_hook,
        "post": fit.optimizer.register_step_post_hook,
        "global pre": register_optimizer_step_pre_hook,
        "global post": register_optimizer_step_post_hook,
    }[place]
    handle = register(hook)
    try:
        after_two_steps(fit)
    finally:
        handle.remove()
    assert seen == ([[1.0, 1.0], [2.0, 2.0]] if "pre" in place else [[2.0, 2.0], [2.5, 2.5]])
    after_two_steps(fit)
    assert len(seen) == 2


def test_a_step_of_the_optimizers_own_is_taken():
    fit = problem()
    calls = []
    step = fit.optimizer.step

    def counted(*args):
        calls.append(args)
        return step(*args)

    fit.optimizer.step = counted
    assert after_two_steps(fit) == [2.5, 2.5]
    assert calls == [(), ()]


def test_a_decorator_around_the_class_s_step_is_called(monkeypatch):
    """It has all attributes of torch's wrapper, `hooked` and `__wrapped__` among them."""

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    fit = problem(Own)
    wrapper, calls = Own.step, []

    @functools.wraps(wrapper)
    def decorated(self, *args):
        calls.append(args)
        return wrapper(self, *args)

    monkeypatch.setattr(Own, "step", decorated)
    assert decorated.hooked
    assert after_two_steps(fit) == [2.5, 2.5]
    assert calls == [(), ()]


def test_a_step_that_a_subclass_defines_is_taken():
    class Halved(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.mul_(0.5)
            return super().step(closure)

    assert after_two_steps(problem(Halved, lr=0.5)) == [2.5, 2.5]


def test_an_unknown_profiler_counts_as_running(monkeypatch):
    """Where torch does not say whether one runs, the step is the public one."""
    fit = problem()
    monkeypatch.delattr(torch.autograd.profiler, "_is_profiler_enabled")
    ranges = []

    class Range(torch.autograd.profiler.record_function):
        def __init__(self, name):
            ranges.append(name)
            super().__init__(name)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", Range)
    assert after_two_steps(fit) == [2.5, 2.5]
    assert ranges == ["Optimizer.step#SGD.step"] * 2
