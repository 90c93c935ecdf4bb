"""Differentiable forms of torch's optimizers: the steps are torch's own, and their derivatives are right."""

from __future__ import annotations

import copy
import inspect
from typing import NamedTuple

import pytest
import torch
from torch import nn, optim
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mlo.errors import ConfigurationError
from mlo.optimizer_steps import State, differentiable_step, optimizer_state, update_derivative

STEPS = 6
# AdamW has always had decoupled decay; Adam has the option since torch 2.7.
DECOUPLED = [(optim.Adam, {"weight_decay": 0.3, "decoupled_weight_decay": True})]
DECOUPLED = DECOUPLED if "decoupled_weight_decay" in inspect.signature(optim.Adam).parameters else []

# Options of the first parameter group; β₂ and α far from 1 keep finite differences accurate.
CASES = [
    (optim.SGD, {}),
    (optim.SGD, {"weight_decay": 0.2, "maximize": True}),
    (optim.SGD, {"momentum": 0.9}),
    (optim.SGD, {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.2}),
    (optim.SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.2, "maximize": True}),
    (optim.Adam, {"betas": (0.8, 0.7)}),
    (optim.Adam, {"betas": (0.8, 0.7), "weight_decay": 0.3, "maximize": True, "eps": 0.1}),
    (optim.Adam, {"betas": (0.3, 0.4), "amsgrad": True, "weight_decay": 0.3}),
    *DECOUPLED,
    (optim.AdamW, {"betas": (0.8, 0.7)}),
    (optim.AdamW, {"betas": (0.3, 0.4), "weight_decay": 0.3, "maximize": True, "amsgrad": True}),
    (optim.RMSprop, {"alpha": 0.7}),
    (optim.RMSprop, {"alpha": 0.6, "momentum": 0.8, "weight_decay": 0.3, "eps": 0.1}),
    (optim.RMSprop, {"alpha": 0.6, "centered": True, "maximize": True}),
    (optim.RMSprop, {"alpha": 0.4, "centered": True, "momentum": 0.7, "maximize": True, "weight_decay": 0.3}),
    (optim.Adagrad, {}),
    (optim.Adagrad, {"lr_decay": 0.3, "initial_accumulator_value": 0.5, "weight_decay": 0.3, "eps": 0.1}),
    (optim.Adagrad, {"lr_decay": 0.3, "weight_decay": 0.3, "maximize": True}),
]
# Hyperparameters that only have to be followed as torch has them.
TENSORS = [
    (optim.SGD, {"lr": torch.tensor(0.1), "momentum": 0.9}),
    (optim.Adam, {"lr": torch.tensor(0.1)}),
    (optim.Adam, {"lr": torch.tensor(0.1), "betas": (torch.tensor(0.8), torch.tensor(0.7))}),
    (optim.AdamW, {"lr": torch.tensor(0.1), "weight_decay": 0.3}),
    (optim.RMSprop, {"lr": torch.tensor(0.1), "momentum": 0.9}),
    (optim.Adagrad, {"lr": torch.tensor(0.1), "lr_decay": 0.3}),
]
if hasattr(inspect.getmodule(optim.Optimizer), "_to_scalar"):  # torch 2.6 fails on it
    TENSORS.append((optim.SGD, {"lr": torch.tensor([0.1], dtype=torch.float64)}))
DEFAULTS = [(kind, {"lr": 0.1}) for kind in (optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad)]
IMPLEMENTATIONS = [
    *((kind, {**options, "foreach": True}) for kind, options in CASES),
    *((kind, {**options, "fused": True}) for kind, options in CASES if kind is not optim.RMSprop),
]


def table(cases):
    def name(case):
        kind, options = case
        return "-".join([kind.__name__, *(f"{k}={v}".replace("torch.", "") for k, v in options.items())])

    return pytest.mark.parametrize(("kind", "options"), cases, ids=name_all(cases, name))


def name_all(cases, name):
    return [name(case) for case in cases]


def make(kind, options, dtype=torch.float64):
    """Four parameters, out of the optimizer's order, in two groups that differ in everything that matters."""
    random = torch.Generator().manual_seed(3)
    a, b, c, d = (nn.Parameter(torch.randn(s, generator=random, dtype=dtype)) for s in [(2, 2), (3,), (), (2,)])
    second = {"lr": 0.07, "weight_decay": 0.4, "maximize": not options.get("maximize", False)}
    options = {"lr": 0.1, **options}
    if isinstance(options["lr"], torch.Tensor):
        options["lr"] = options["lr"].clone()
    return [a, b, c, d], kind([{"params": [d, a]}, {"params": [b, c], **second}], **options)


def draw(parameters, t):
    """Random gradients, none of them near 0; the first parameter has none in the steps 0 and 3, the last in step 2."""
    random = torch.Generator().manual_seed(100 + t)
    drawn = [torch.randn(p.shape, generator=random, dtype=torch.float64) for p in parameters]
    gradients = [(g + 0.3 * g.sign()).to(p.dtype) for g, p in zip(drawn, parameters, strict=True)]
    return [None if (i, t % 6) in {(0, 0), (0, 3), (3, 2)} else g for i, g in enumerate(gradients)]


def take(optimizer, parameters, gradients):
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = None if g is None else g.clone()
    optimizer.step()


def copied(parameters):
    return tuple(p.detach().clone() for p in parameters)


class Record(NamedTuple):
    step: object
    gradients: list
    after: tuple  # parameters
    state: State  # after the step


def run(parameters, optimizer, steps=STEPS, first=0):
    """Let torch take steps; the learning rate changes between them."""
    records = []
    for t in range(first, first + steps):
        gradients = draw(parameters, t)
        step = differentiable_step(optimizer, parameters)
        take(optimizer, parameters, gradients)
        records.append(Record(step, gradients, copied(parameters), optimizer_state(optimizer, parameters)))
        for group in optimizer.param_groups:
            group["lr"] *= 0.8  # in place where it is a tensor
    return records


def assert_replayed(kind, options, dtype=torch.float64, first=0, **tolerance):
    """Repeat a run from its records alone, when it is over."""
    parameters, optimizer = make(kind, options, dtype)
    theta, state = copied(parameters), optimizer_state(optimizer, parameters)
    for record in run(parameters, optimizer, first=first):
        theta, state = record.step.apply(theta, record.gradients, state)
        assert_close(theta, record.after, **tolerance)
        assert state.layout == record.state.layout
        assert_close(state.tensors, record.state.tensors, **tolerance)


@table(CASES + TENSORS + DEFAULTS)
def test_repeats_the_steps_of_torch(kind, options):
    assert_replayed(kind, options, rtol=1e-13, atol=1e-15)


@table(IMPLEMENTATIONS)
def test_repeats_other_implementations_to_rounding(kind, options):
    # Fused SGD fails in torch itself where some parameters have no gradient in their group's first step.
    assert_replayed(kind, options, first=1, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@table(CASES + DEFAULTS)
def test_repeats_the_steps_in_low_precision(kind, options, dtype):
    unit = torch.finfo(dtype).eps
    assert_replayed(kind, options, dtype, rtol=4 * unit, atol=4 * unit)


def test_state_is_torchs_own():
    parameters, optimizer = make(optim.Adam, {"amsgrad": True})
    assert optimizer_state(optimizer, parameters).layout.names == ((),) * 4
    assert optimizer_state(optimizer, parameters).tensors == ()
    take(optimizer, parameters, draw(parameters, 0))
    state = optimizer_state(optimizer, parameters)
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert state.layout.names == ((), names, names, names)
    assert state.layout.steps == (0, 1, 1, 1)
    assert len(state.tensors) == 9
    for p, own in zip(parameters, state.by_parameter(), strict=True):
        for name, tensor in own.items():
            assert torch.equal(tensor, optimizer.state[p][name])
            assert tensor.data_ptr() != optimizer.state[p][name].data_ptr()
    for entry in optimizer.state.values():
        entry["exp_avg"].requires_grad_()
    assert not any(t.requires_grad for t in optimizer_state(optimizer, parameters).tensors)
    with pytest.raises(ValueError, match="shorter"):
        State(state.layout, state.tensors[:-1]).by_parameter()


def test_a_momentum_buffer_of_none_is_no_state():
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    optimizer.state[p]["momentum_buffer"] = None
    step, state = differentiable_step(optimizer, [p]), optimizer_state(optimizer, [p])
    g = torch.tensor([0.3, -0.4], dtype=torch.float64)
    after, _ = step.apply(copied([p]), [g], state)
    take(optimizer, [p], [g])
    assert_close(after, copied([p]), rtol=1e-13, atol=0)


@table(
    [
        (optim.SGD, {"momentum": 0.9}),
        (optim.Adam, {"amsgrad": True}),
        (optim.RMSprop, {"momentum": 0.9}),
        (optim.RMSprop, {"centered": True}),
    ]
)
def test_an_option_switched_off_keeps_its_state(kind, options):
    parameters, optimizer = make(kind, options)
    theta, state = copied(parameters), optimizer_state(optimizer, parameters)
    for t in range(6):
        for group in optimizer.param_groups:
            group.update({name: value if t < 3 else type(value)() for name, value in options.items()})
        step, gradients = differentiable_step(optimizer, parameters), draw(parameters, t)
        theta, state = step.apply(theta, gradients, state)
        take(optimizer, parameters, gradients)
        expected = optimizer_state(optimizer, parameters)
        assert state.layout == expected.layout
        assert_close(state.tensors, expected.tensors, rtol=1e-13, atol=1e-15)
        assert_close(theta, copied(parameters), rtol=1e-13, atol=1e-15)


def test_some_parameters_only():
    parameters, optimizer = make(optim.Adam, {})
    records = run(parameters, optimizer, 2)
    some = [parameters[2], parameters[0]]
    parameters, optimizer = make(optim.Adam, {})
    some = [parameters[2], parameters[0]]
    theta, state = copied(some), optimizer_state(optimizer, some)
    for record in records:
        theta, state = differentiable_step(optimizer, some).apply(
            theta, [record.gradients[2], record.gradients[0]], state
        )
        take(optimizer, parameters, record.gradients)
        optimizer.param_groups[0]["lr"] *= 0.8
        optimizer.param_groups[1]["lr"] *= 0.8
    assert_close(theta, (records[-1].after[2], records[-1].after[0]), rtol=1e-13, atol=1e-15)


def test_group_added_later():
    p, q = nn.Parameter(torch.ones(2, dtype=torch.float64)), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = optim.Adagrad([p], lr=0.1, initial_accumulator_value=0.5)
    optimizer.add_param_group({"params": [q], "initial_accumulator_value": 0.1})
    step, state = differentiable_step(optimizer, [p, q]), optimizer_state(optimizer, [p, q])
    assert state.layout.names == (("sum",), ())
    g = [torch.tensor([1.0, 2.0], dtype=torch.float64)] * 2
    theta, _ = step.apply(copied([p, q]), g, state)
    # torch 2.6 cannot take this step at all; later ones start both from the constructor's value.
    assert_close(theta[1], theta[0])
    if "initial_accumulator_value" in inspect.getsource(optim.Adagrad._init_group):
        take(optimizer, [p, q], g)
        assert_close(theta, copied([p, q]), rtol=1e-13, atol=0)


@pytest.fixture
def checked_sparse_tensors():
    """Torch warns of sparse tensors unless one says whether they are to be checked."""
    with torch.sparse.check_sparse_tensor_invariants():
        yield


@pytest.mark.parametrize(
    "make_optimizer",
    [lambda p: optim.SGD(p, lr=0.1, momentum=0.9), lambda p: optim.Adagrad(p, lr=0.1)],
    ids=["SGD", "Adagrad"],
)
def test_sparse_gradients(make_optimizer, checked_sparse_tensors):
    table = nn.Parameter(torch.randn(4, 2, dtype=torch.float64))
    optimizer = make_optimizer([table])
    theta, state = copied([table]), optimizer_state(optimizer, [table])
    for rows in ([0, 2], [2, 2], [1, 0]):
        gradient = torch.sparse_coo_tensor(torch.tensor([rows]), torch.randn(2, 2, dtype=torch.float64), (4, 2))
        step = differentiable_step(optimizer, [table])
        assert update_derivative(step, theta, [gradient], state)[0].shape == (4, 2)
        theta, state = step.apply(theta, [gradient], state)
        take(optimizer, [table], [gradient])
        assert_close(theta, copied([table]), rtol=1e-13, atol=1e-15)
        assert_close(state.tensors, optimizer_state(optimizer, [table]).tensors, rtol=1e-13, atol=1e-15)


# Derivatives


def at_step(kind, options, steps):
    """Return the tensors that `apply` takes at a step, and `apply` as a function of them alone."""
    parameters, optimizer = make(kind, options)
    run(parameters, optimizer, steps)
    step, state = differentiable_step(optimizer, parameters), optimizer_state(optimizer, parameters)
    gradients = draw(parameters, steps)
    present = [g for g in gradients if g is not None]
    inputs = [t.detach().requires_grad_() for t in (*parameters, *present, *state.tensors)]

    def function(*tensors):
        theta, rest = tensors[: len(parameters)], iter(tensors[len(parameters) :])
        given = [None if g is None else next(rest) for g in gradients]
        after, new = step.apply(theta, given, State(state.layout, tuple(rest)))
        return *after, *new.tensors

    return function, inputs


@pytest.mark.parametrize("steps", [0, 2])
@table(CASES)
def test_derivatives(kind, options, steps):
    function, inputs = at_step(kind, options, steps)
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("steps", [0, 2])
@table(CASES)
def test_second_derivatives(kind, options, steps):
    function, inputs = at_step(kind, options, steps)
    assert gradgradcheck(function, inputs)


def quadratic(x, parameters):
    """A loss whose first parameter is not always used; its gradient depends on x nonlinearly."""
    _, b, c, d = parameters
    return ((b * x).sin() * b).sum() + (c * d - x[0]).square().sum() + (0.5 * (c * x).sum()).cos()


@table(CASES)
def test_differentiates_through_torchs_own_run(kind, options):
    """d(loss after a run)/dx by the recorded steps, against torch's optimizer run again at shifted x."""
    parameters, optimizer = make(kind, options)
    run(parameters, optimizer, 2)  # warm state
    x = torch.tensor([0.6, -0.4, 0.9], dtype=torch.float64, requires_grad=True)

    def gradients_at(theta, x, **how):
        return torch.autograd.grad(quadratic(x, theta), theta, allow_unused=True, **how)

    theta, state = copied(parameters), optimizer_state(optimizer, parameters)
    theta = tuple(p.requires_grad_() for p in theta)
    start = copy.deepcopy((parameters, optimizer))

    own_parameters, own = copy.deepcopy(start)
    for _ in range(4):
        step = differentiable_step(own, own_parameters)
        take(own, own_parameters, gradients_at(own_parameters, x.detach()))
        theta, state = step.apply(theta, gradients_at(theta, x, create_graph=True), state)
    assert_close(theta, copied(own_parameters), rtol=1e-12, atol=1e-14)
    found = torch.autograd.grad(quadratic(x.detach(), theta), x)[0]

    def value(shifted):
        parameters, optimizer = copy.deepcopy(start)
        for _ in range(4):
            take(optimizer, parameters, gradients_at(parameters, shifted))
        return quadratic(x.detach(), parameters).detach()

    h = 1e-5 * torch.eye(3, dtype=torch.float64)
    expected = torch.stack([(value(x.detach() + e) - value(x.detach() - e)) / 2e-5 for e in h])
    assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("steps", [0, 2])
@table(CASES)
def test_update_derivative(kind, options, steps):
    parameters, optimizer = make(kind, options)
    run(parameters, optimizer, steps)
    step, state = differentiable_step(optimizer, parameters), optimizer_state(optimizer, parameters)
    gradients = draw(parameters, steps)
    with torch.no_grad():
        found = update_derivative(step, parameters, gradients, state)

    def after(shift):
        own_parameters, own = copy.deepcopy((parameters, optimizer))
        take(own, own_parameters, [None if g is None else g + shift for g in gradients])
        return copied(own_parameters)

    # All elements at once: the update acts on each by itself.
    h = 1e-5
    expected = tuple((m - p) / (2 * h) for m, p in zip(after(-h), after(h), strict=True))
    assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert not any(d.requires_grad for d in found)
    for d, p, g in zip(found, parameters, gradients, strict=True):
        assert d.shape == p.shape
        assert g is not None or not d.any()


@table(CASES)
def test_update_derivative_is_the_whole_jacobian(kind, options):
    function, inputs = at_step(kind, options, 2)
    parameters, optimizer = make(kind, options)
    run(parameters, optimizer, 2)
    step, state = differentiable_step(optimizer, parameters), optimizer_state(optimizer, parameters)
    found = update_derivative(step, parameters, draw(parameters, 2), state)
    jacobian = torch.autograd.functional.jacobian(
        lambda g: torch.cat([t.reshape(-1) for t in function(*inputs[:5], g, *inputs[6:])[:4]]), inputs[5]
    )
    expected = torch.zeros(10, 3, dtype=torch.float64)
    expected[4:7] = -torch.diag(found[1])
    assert_close(jacobian, expected)


@table(CASES)
def test_update_derivative_is_partial(kind, options):
    """Parameters and state that depend on the gradients themselves are constants in it."""
    parameters, optimizer = make(kind, options)
    run(parameters, optimizer, 2)
    step, state = differentiable_step(optimizer, parameters), optimizer_state(optimizer, parameters)
    gradients = draw(parameters, 2)
    expected = update_derivative(step, parameters, gradients, state)
    assert not any(g.requires_grad for g in gradients if g is not None)
    leaves = [None if g is None else g.requires_grad_() for g in gradients]
    total = sum(g.sum() for g in leaves if g is not None)
    dependent = State(state.layout, tuple(t + (total - total.item()) for t in state.tensors))
    found = update_derivative(step, [p + (total - total.item()) for p in parameters], leaves, dependent)
    assert_close(found, expected, rtol=1e-13, atol=0)
    assert not any(d.requires_grad for d in found)


def test_update_derivative_of_sgd_is_the_learning_rate():
    parameters, optimizer = make(optim.SGD, {})
    step, state = differentiable_step(optimizer, parameters), optimizer_state(optimizer, parameters)
    found = update_derivative(step, parameters, draw(parameters, 1), state)
    for d, rate in zip(found, [0.1, -0.07, -0.07, 0.1], strict=True):  # the second group maximises
        assert_close(d, torch.full_like(d, rate))
    assert not any(d.any() for d in update_derivative(step, parameters, [None] * 4, state))


# √v at 0

SINGULAR = [
    (optim.Adam, {}),
    (optim.Adam, {"amsgrad": True}),
    (optim.AdamW, {"weight_decay": 0.3}),
    (optim.RMSprop, {}),
    (optim.RMSprop, {"momentum": 0.9}),
    (optim.RMSprop, {"centered": True}),
    (optim.Adagrad, {}),
]


def one(kind, options):
    p = nn.Parameter(torch.tensor([0.5, -0.25, 2.0], dtype=torch.float64))
    optimizer = kind([p], lr=0.1, **options)
    return p, optimizer, differentiable_step(optimizer, [p]), optimizer_state(optimizer, [p])


@table(SINGULAR)
def test_zero_gradient_in_the_first_step(kind, options):
    p, optimizer, step, state = one(kind, {"eps": 1e-3, **options})
    g = torch.tensor([0.0, 0.3, -0.0], dtype=torch.float64, requires_grad=True)
    state = State(state.layout, tuple(t.requires_grad_() for t in state.tensors))
    (after,), new = step.apply([p], [g], state)

    # The update is η g/(|g| + ε) times constants: η/ε at 0.
    gradient = torch.autograd.grad(after.sum(), g, create_graph=True)[0]
    assert_close(-gradient[::2].detach(), torch.full((2,), 0.1 / 1e-3, dtype=torch.float64), rtol=1e-12, atol=0)
    assert_close(update_derivative(step, [p], [g], state)[0], -gradient.detach(), rtol=0, atol=0)
    near, _ = step.apply([p], [torch.full_like(g, 1e-12)], state)
    at, _ = step.apply([p], [torch.zeros_like(g)], state)
    assert_close((at[0] - near[0]) / 1e-12, torch.full_like(g, 100.0), rtol=1e-4, atol=0)

    # The second derivative jumps at 0, from one sign to the other; elsewhere it is what it is.
    second = torch.autograd.grad(gradient.sum(), g, create_graph=True)[0]
    assert second[0] == 0
    assert second[2] == 0
    assert second[1] != 0
    everything = [p, g, *state.tensors]
    outputs = [after.sum(), *(t.sum() for t in new.tensors)]
    for d in torch.autograd.grad([*outputs, gradient.square().sum(), second.square().sum()], everything):
        assert d.isfinite().all()

    take(optimizer, [p], [g.detach()])
    assert_close(after.detach(), p.detach(), rtol=1e-13, atol=0)


@table(SINGULAR)
def test_the_other_elements_are_untouched(kind, options):
    p, _, step, state = one(kind, options)
    zero = torch.tensor([0.0, 0.3, -1.2], dtype=torch.float64)
    with_zero = update_derivative(step, [p], [zero], state)[0]
    without = update_derivative(step, [p], [torch.tensor([0.7, 0.3, -1.2], dtype=torch.float64)], state)[0]
    assert torch.equal(with_zero[1:], without[1:])


@table(SINGULAR)
def test_a_unit_without_gradient_for_several_steps(kind, options):
    """A weight that the loss does not use but that has a gradient of 0, as behind a dead ReLU."""
    p, optimizer, _, state = one(kind, options)
    x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    start = p.detach().clone().requires_grad_()
    theta = (start,)
    for _ in range(3):
        loss = (x * theta[0][:2].square()).sum() + (theta[0][2] - 9).relu()
        gradients = torch.autograd.grad(loss, theta, create_graph=True)
        assert gradients[0][2] == 0
        step = differentiable_step(optimizer, [p])
        theta, state = step.apply(theta, gradients, state)
        take(optimizer, [p], [gradients[0].detach()])
    assert all(d.isfinite().all() for d in torch.autograd.grad(theta[0].sum(), [x, start]))
    assert_close(theta[0].detach(), p.detach(), rtol=1e-13, atol=0)


def test_not_a_number_where_torch_has_it():
    p, optimizer, step, state = one(optim.Adam, {"eps": 0.0})
    g = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    after = step.apply([p], [g], state)[0][0].detach()
    take(optimizer, [p], [g])
    assert_close(after, p.detach(), equal_nan=True)
    assert after.isnan().tolist() == [True, False, False]


def test_a_negative_variance_is_not_a_number_as_in_torch():
    """v − a² < 0 by rounding: not the point at which the derivative is mended."""
    p, optimizer, _, _ = one(optim.RMSprop, {"centered": True})
    take(optimizer, [p], [torch.ones_like(p)])
    optimizer.state[p]["grad_avg"] += torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    step, state = differentiable_step(optimizer, [p]), optimizer_state(optimizer, [p])
    after = step.apply([p], [torch.ones_like(p)], state)[0][0].detach()
    take(optimizer, [p], [torch.ones_like(p)])
    assert after.isnan().tolist() == [False, True, False]
    assert_close(after, p.detach(), equal_nan=True)


# What it leaves alone, and what it refuses


@table(CASES)
def test_changes_nothing(kind, options):
    parameters, optimizer = make(kind, options)
    for t in range(2):
        everything = [*parameters, *draw_all(parameters), *tensors_of(optimizer)]
        before = [(x, x._version, x.detach().clone()) for x in everything]
        state_before = copy.deepcopy(optimizer.state_dict())
        known = set(optimizer.state)
        step, state = differentiable_step(optimizer, parameters), optimizer_state(optimizer, parameters)
        kept = copied(state.tensors)
        gradients = [p.grad for p in parameters]
        after, _ = step.apply(parameters, gradients, state)
        update_derivative(step, parameters, gradients, state)
        assert all(x._version == version and torch.equal(x, value) for x, version, value in before)
        assert all(torch.equal(a, b) for a, b in zip(kept, state.tensors, strict=True))
        assert str(optimizer.state_dict()) == str(state_before)
        assert set(optimizer.state) == known
        assert all(p.requires_grad and p.is_leaf and p.grad is g for p, g in zip(parameters, gradients, strict=True))
        assert all(a.requires_grad for a in after)
        take(optimizer, parameters, draw(parameters, t))
        # Nor does the optimizer's own step reach what was copied.
        assert all(torch.equal(a, b) for a, b in zip(kept, state.tensors, strict=True))


def draw_all(parameters):
    for p, g in zip(parameters, draw(parameters, 1), strict=True):
        p.grad = g
    return [p.grad for p in parameters]


def tensors_of(optimizer):
    return [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]


def test_new_state_shares_no_memory_with_gradients():
    parameters, optimizer = make(optim.SGD, {"momentum": 0.9})
    step, state = differentiable_step(optimizer, parameters), optimizer_state(optimizer, parameters)
    gradients = draw(parameters, 1)
    _, new = step.apply(parameters, gradients, state)
    assert not {t.data_ptr() for t in new.tensors} & {g.data_ptr() for g in gradients}


def test_a_parameter_without_gradient_is_handed_through():
    parameters, optimizer = make(optim.AdamW, {"weight_decay": 0.3})
    run(parameters, optimizer, 2)
    step, state = differentiable_step(optimizer, parameters), optimizer_state(optimizer, parameters)
    after, new = step.apply(parameters, [None] * 4, state)
    assert all(a is p for a, p in zip(after, parameters, strict=True))
    assert all(a is b for a, b in zip(new.tensors, state.tensors, strict=True))
    assert new.layout == state.layout


def test_passes_through_a_checkpoint():
    function, inputs = at_step(optim.Adam, {"betas": (0.8, 0.7)}, 2)
    plain = torch.autograd.grad(sum(t.square().sum() for t in function(*inputs)), inputs)
    again = checkpoint(function, *inputs, use_reentrant=False)
    assert_close(torch.autograd.grad(sum(t.square().sum() for t in again), inputs), plain, rtol=0, atol=0)


def test_with_a_scheduler():
    parameters, optimizer = make(optim.SGD, {"momentum": 0.9})
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    theta, state = copied(parameters), optimizer_state(optimizer, parameters)
    steps, gradients = [], [draw(parameters, t) for t in range(3)]
    for g in gradients:
        steps.append(differentiable_step(optimizer, parameters))
        take(optimizer, parameters, g)
        scheduler.step()
    assert [s.options[0]["lr"] for s in steps] == [0.1, 0.05, 0.025]
    for step, g in zip(steps, gradients, strict=True):
        theta, state = step.apply(theta, g, state)
    assert_close(theta, copied(parameters), rtol=1e-13, atol=1e-15)


class Overridden(optim.Adam):
    def step(self, closure=None):
        return None


@pytest.mark.parametrize("kind", [optim.Adadelta, optim.NAdam, optim.LBFGS, Overridden])
@pytest.mark.parametrize("ask", [differentiable_step, optimizer_state])
def test_refuses_other_optimizers(kind, ask):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigurationError) as refusal:
        ask(kind([p]), [p])
    message = str(refusal.value)
    assert f"{kind.__name__} cannot be" in message
    assert "SGD, Adam, AdamW, RMSprop and Adagrad" in message
    assert "mlo.ConjugateGradient" in message


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_refuses_step_hooks(register):
    p = nn.Parameter(torch.ones(2))
    optimizer = optim.Adam([p])
    handle = getattr(optimizer, register)(lambda *_: None)
    with pytest.raises(ConfigurationError, match=r"Adam has step hooks.*Remove the hooks.*mlo\.ConjugateGradient"):
        differentiable_step(optimizer, [p])
    handle.remove()
    differentiable_step(optimizer, [p])


def test_refuses_parameters_of_others():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigurationError, match=r"SGD does not hold parameter 1 of the 2 .*shape \(3,\)"):
        differentiable_step(optim.SGD([p], lr=0.1), [p, q])


def test_refuses_the_state_of_another_step():
    parameters, optimizer = make(optim.Adam, {})
    first, state = differentiable_step(optimizer, parameters), optimizer_state(optimizer, parameters)
    theta, state = first.apply(parameters, draw(parameters, 1), state)
    with pytest.raises(ConfigurationError) as refusal:
        first.apply(theta, draw(parameters, 1), state)
    message = str(refusal.value)
    assert "step of Adam is applied to another state" in message
    assert "expected nothing after 0 counted steps for parameter 0, got exp_avg, exp_avg_sq after 1 " in message
    with pytest.raises(ConfigurationError, match="expected one of 1 parameters, got one of 4"):
        differentiable_step(optimizer, parameters[:1]).apply(theta[:1], draw(parameters, 1)[:1], state)
    run(parameters, optimizer, 2)
    with pytest.raises(ConfigurationError, match=r"parameter 1, got exp_avg, exp_avg_sq after 1 counted.*in the order"):
        differentiable_step(optimizer, parameters).apply(theta, draw(parameters, 1), state)
    optimizer.state.clear()
    with pytest.raises(ConfigurationError, match="reset or loaded"):
        differentiable_step(optimizer, parameters).apply(theta, draw(parameters, 1), state)
