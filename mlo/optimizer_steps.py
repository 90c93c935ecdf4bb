"""Steps of torch's own optimizers as pure functions, which can be differentiated.

An optimizer of torch changes parameters and its own state in place and without a graph. To differentiate
through steps that it has taken, they are recorded: `differentiable_step` notes the options of the step that is
about to be taken, `optimizer_state` the state before the first of them. `OptimizerStep.apply` then repeats a step out
of place, (θ_t, g_t, s_t) ↦ (θ_{t+1}, s_{t+1}), by the operations that torch itself applies to one tensor at a time;
torch's `foreach`, `fused` and `capturable` variants differ from it by rounding.

>>> theta = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
>>> optimizer = torch.optim.SGD([theta], lr=0.1, momentum=0.5)
>>> step, state = differentiable_step(optimizer, [theta]), optimizer_state(optimizer, [theta])
>>> after, state = step.apply([theta], [2 * theta], state)  # of the loss θ²: θ ↦ θ − 0.1·2θ
>>> after[0].tolist(), torch.autograd.grad(after[0].sum(), theta)[0].tolist()
([0.800000011920929, 1.600000023841858], [0.800000011920929, 0.800000011920929])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from mlo.errors import ConfigurationError
from mlo.vectors import Vector, zeros_like


@dataclass(frozen=True)
class StateLayout:
    """What an optimizer keeps for each of some parameters, without the tensors themselves.

    Attributes:
        names: torch's names of the state tensors of each parameter, in alphabetical order; none before the first step.
        steps: how many steps have been counted for each parameter; 0 where the optimizer counts none (SGD).

    """

    names: tuple[tuple[str, ...], ...]
    steps: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class State:
    """The state of an optimizer for some parameters: a flat tuple of tensors, and what they are.

    `tensors` is what can be differentiated and what passes through an autograd function or a checkpoint;
    `State(state.layout, other_tensors)` puts it together again.

    Attributes:
        layout: names of the tensors, and step counts, for each parameter.
        tensors: the tensors in the order of `layout.names`.

    """

    layout: StateLayout
    tensors: Vector

    def by_parameter(self) -> list[dict[str, Tensor]]:
        """Return the tensors of each parameter under torch's names."""
        found: list[dict[str, Tensor]] = [{} for _ in self.layout.names]
        places = [(own, name) for own, names in zip(found, self.layout.names, strict=True) for name in names]
        for (own, name), tensor in zip(places, self.tensors, strict=True):
            own[name] = tensor
        return found


def _difference(expected: StateLayout, got: StateLayout) -> str:
    """Return the first difference of two layouts in words."""
    if len(expected.names) != len(got.names):
        return f"expected one of {len(expected.names)} parameters, got one of {len(got.names)}"
    pairs = zip(zip(expected.names, expected.steps, strict=True), zip(got.names, got.steps, strict=True), strict=True)
    i, (wanted, found) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    one, other = (f"{', '.join(names) or 'nothing'} after {steps} counted steps" for names, steps in (wanted, found))
    return f"expected {one} for parameter {i}, got {other}"


def _as_state(by_parameter: Sequence[Mapping[str, Tensor]], steps: Sequence[int]) -> State:
    """Put a state together from the tensors of each parameter."""
    layout = StateLayout(tuple(tuple(sorted(own)) for own in by_parameter), tuple(steps))
    return State(layout, tuple(own[name] for own in by_parameter for name in sorted(own)))


@dataclass(frozen=True, eq=False)
class OptimizerStep:
    """One step of an optimizer as a function of parameters, gradients and state.

    Everything else that the step depends on was read when the record was made; later changes of the optimizer
    (by a learning-rate scheduler, say) do not reach it. Hyperparameters are constants: no derivative is taken in them.

    Attributes:
        optimizer: the optimizer's class.
        options: for each parameter the options of its group that the step depends on, under torch's names.
        layout: what the optimizer had in its state when the record was made.

    """

    optimizer: type[optim.Optimizer]
    options: tuple[Mapping[str, Any], ...]
    layout: StateLayout

    def apply(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], state: State
    ) -> tuple[Vector, State]:
        """Return parameters and state after the step, differentiable in all tensors given, any number of times.

        Nothing is changed in place. A parameter whose gradient is `None` is skipped as torch does: it and its
        state are handed through. Sparse gradients count as dense ones.

        Where √v occurs (Adam, AdamW, RMSprop, Adagrad), its derivatives at v = 0 exactly, where they are infinite,
        are taken as 0. Zero gradients from the first step on put v there. In the first step the update is
        η·g/(|g| + ε) up to constants, whose derivative at g = 0 is η/ε: that is what comes out. Its second derivative
        jumps there, between ∓2η/ε²; their mean, 0, comes out. (With ε = 0 the step itself is NaN, as torch's is.)
        AMSGrad's maximum of two equal numbers has half the derivative in each.

        Cost: that of torch's step for one tensor at a time; the graph keeps nothing for SGD, and three to six
        tensors of each parameter's size for the others.

        Raises:
            ConfigurationError: if the state is not the one that the optimizer had at this step.

        """
        if state.layout != self.layout:
            raise ConfigurationError(
                f"a recorded step of {self.optimizer.__name__} is applied to another state than the optimizer had at "
                f"that step: {_difference(self.layout, state.layout)}. Apply recorded steps in the order in which they "
                "were taken, from optimizer_state() before the first of them, and record anew after the optimizer's "
                "state was reset or loaded."
            )
        rule = _RULES[self.optimizer]
        after = list(parameters)
        slots, steps = state.by_parameter(), list(state.layout.steps)
        for i, (parameter, gradient, options) in enumerate(zip(parameters, gradients, self.options, strict=True)):
            if gradient is None:
                continue
            steps[i] += rule.counts_steps
            after[i], changed = rule.update(options, parameter, _dense(gradient), slots[i], steps[i])
            slots[i] = {**slots[i], **changed}
        return tuple(after), _as_state(slots, steps)


def differentiable_step(optimizer: optim.Optimizer, parameters: Sequence[Tensor]) -> OptimizerStep:
    """Record the step that `optimizer` is about to take, for the given ones of its parameters.

    Known are SGD, Adam, AdamW, RMSprop and Adagrad of torch with all their options, for real parameters. Step hooks
    that are registered for all optimizers at once (by profilers) are taken to observe only.

    Raises:
        ConfigurationError: if the optimizer is none of these, a subclass of them included; if it has step hooks,
            which may change anything; or if it does not hold one of the parameters.

    """
    rule = _rule_of(optimizer)
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ConfigurationError(
            f"the optimizer {type(optimizer).__name__} has step hooks (register_step_pre_hook, "
            "register_step_post_hook), so what its step does is not known and cannot be differentiated; expected an "
            f"optimizer without them. Remove the hooks, or {_IMPLICIT}."
        )
    options = [_options(optimizer, group, rule) for group in optimizer.param_groups]
    index = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for i, p in enumerate(parameters):
        if id(p) not in index:
            raise ConfigurationError(
                f"the optimizer {type(optimizer).__name__} does not hold parameter {i} of the {len(parameters)} whose "
                f"step is to be recorded (shape {tuple(p.shape)}). Pass the very tensors that it was built with."
            )
    layout = _state(optimizer, parameters, rule).layout
    return OptimizerStep(type(optimizer), tuple(options[index[id(p)]] for p in parameters), layout)


def optimizer_state(optimizer: optim.Optimizer, parameters: Sequence[Tensor]) -> State:
    """Return a copy of what `optimizer` keeps for some of its parameters; nothing before the first step.

    Raises:
        ConfigurationError: if the optimizer is not known to `differentiable_step`.

    """
    kept = _state(optimizer, parameters, _rule_of(optimizer))
    return State(kept.layout, tuple(_dense(t.detach()).clone() for t in kept.tensors))


def update_derivative(
    step: OptimizerStep, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], state: State
) -> Vector:
    """Return the diagonal of ∂(θ_t − θ_{t+1})/∂g_t; 0 for parameters without a gradient.

    All of these optimizers act on each element by itself, so that the matrix is diagonal and one reverse pass gives
    it. For SGD it is the learning rate. At g = 0 it is what `OptimizerStep.apply` says.

    The result is a constant: it has no graph.

    Source: the preconditioner of Choe et al., "Making Scalable Meta Learning Practical" (SAMA), NeurIPS 2023, with
    the learning rate included.

    >>> theta = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.Adam([theta], lr=0.5, eps=0.25)
    >>> step, state = differentiable_step(optimizer, [theta]), optimizer_state(optimizer, [theta])
    >>> found = update_derivative(step, [theta], [torch.tensor([0.0, 0.75])], state)[0]
    >>> torch.allclose(found, torch.tensor([2.0, 0.125]))  # η ε/(|g| + ε)² in the first step
    True
    """
    held = tuple(p.detach() for p in parameters)
    leaves = tuple(None if g is None else _dense(g.detach()).requires_grad_() for g in gradients)
    moved = {i: g for i, g in enumerate(leaves) if g is not None}
    if not moved:  # torch has no derivative in nothing
        return zeros_like(held)
    with torch.enable_grad():
        after, _ = step.apply(held, leaves, State(state.layout, tuple(t.detach() for t in state.tensors)))
        # θ_t is a constant here, so that what is left of θ_t − θ_{t+1} is −θ_{t+1}.
        outputs = [-after[i] for i in moved]
        found = torch.autograd.grad(outputs, list(moved.values()), [torch.ones_like(t) for t in outputs])
    diagonal = dict(zip(moved, found, strict=True))
    return tuple(diagonal[i] if i in diagonal else torch.zeros_like(p) for i, p in enumerate(held))


_Options = Mapping[str, Any]
_Slots = Mapping[str, Tensor]
# Takes the options, θ, g, the state tensors and the number of this step (from 1); returns the new θ, and the
# state tensors that changed.
_Update = Callable[[_Options, Tensor, Tensor, _Slots, int], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class _Rule:
    """How an optimizer of torch takes a step: the options and state tensors that matter, and the formula."""

    options: tuple[str, ...]
    slots: tuple[str, ...]
    update: _Update
    counts_steps: bool = True


def _sgd(
    options: _Options, theta: Tensor, gradient: Tensor, slots: _Slots, _step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """SGD: g ← ±g + λθ;  b ← μb + (1 − τ)g, at first b ← g;  θ ← θ − ηb (−η(g + μb) for Nesterov's).

    Source: torch.optim.SGD; Sutskever et al., "On the importance of initialization and momentum in deep learning",
    ICML 2013, for the momentum, of which torch's form has η outside of b.
    """
    g = _descent(options, theta, gradient)
    changed = {}
    momentum = options["momentum"]
    if momentum != 0:
        kept = slots.get("momentum_buffer")
        # The first buffer is a copy: state that shared memory with a gradient would change with it.
        buffer = g.clone() if kept is None else kept.mul(momentum).add(g, alpha=1 - options["dampening"])
        changed["momentum_buffer"] = buffer
        g = g.add(buffer, alpha=momentum) if options["nesterov"] else buffer
    return theta.add(g, alpha=-float(options["lr"])), changed


def _adam(
    options: _Options, theta: Tensor, gradient: Tensor, slots: _Slots, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adam: m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  θ ← θ − η/(1 − β₁ᵗ) · m/(√v/√(1 − β₂ᵗ) + ε).

    Before, g ← ±g + λθ, or θ ← (1 − ηλ)θ with decoupled decay. AMSGrad has max(v over all steps) for v in θ's line.

    Source: torch.optim.Adam and AdamW; Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015; Reddi,
    Kale and Kumar, "On the Convergence of Adam and Beyond", ICLR 2018; Loshchilov and Hutter, "Decoupled Weight
    Decay Regularization", ICLR 2019.
    """
    lr, decay, (beta1, beta2) = options["lr"], options["weight_decay"], options["betas"]
    if options["decoupled_weight_decay"]:
        g = -gradient if options["maximize"] else gradient
        if decay != 0:
            theta = theta.mul(float(1 - lr * decay))
    else:
        g = _descent(options, theta, gradient)
    m = _kept(slots, "exp_avg", theta).lerp(g, float(1 - beta1))
    v = _kept(slots, "exp_avg_sq", theta).mul(float(beta2)).addcmul(g, g, value=float(1 - beta2))
    changed = {"exp_avg": m, "exp_avg_sq": v}
    if options["amsgrad"]:
        v = changed["max_exp_avg_sq"] = torch.maximum(_kept(slots, "max_exp_avg_sq", theta), v)
    # Tensors among the hyperparameters round as they do in torch: they become numbers last.
    scale = (1 - beta2**step) ** 0.5
    denominator = _root(v).div(float(scale)).add(options["eps"])
    return theta.addcdiv(m, denominator, value=-float(lr / (1 - beta1**step))), changed


def _rmsprop(
    options: _Options, theta: Tensor, gradient: Tensor, slots: _Slots, _step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """RMSprop: g ← ±g + λθ;  v ← αv + (1 − α)g²;  d = g/(√v + ε);  b ← μb + d;  θ ← θ − ηb (−ηd without momentum).

    Centred: a ← αa + (1 − α)g, and √(v − a²) for √v.

    Source: torch.optim.RMSprop; Tieleman and Hinton, "Lecture 6.5: rmsprop", Coursera 2012; Graves, "Generating
    Sequences With Recurrent Neural Networks", arXiv:1308.0850, for the centred form.
    """
    g = _descent(options, theta, gradient)
    lr, alpha, momentum = float(options["lr"]), options["alpha"], options["momentum"]
    v = _kept(slots, "square_avg", theta).mul(alpha).addcmul(g, g, value=1 - alpha)
    changed = {"square_avg": v}
    if options["centered"]:
        mean = changed["grad_avg"] = _kept(slots, "grad_avg", theta).lerp(g, 1 - alpha)
        v = v.addcmul(mean, mean, value=-1)
    denominator = _root(v).add(options["eps"])
    if momentum > 0:
        buffer = _kept(slots, "momentum_buffer", theta).mul(momentum).addcdiv(g, denominator)
        changed["momentum_buffer"] = buffer
        return theta.add(buffer, alpha=-lr), changed
    return theta.addcdiv(g, denominator, value=-lr), changed


def _adagrad(
    options: _Options, theta: Tensor, gradient: Tensor, slots: _Slots, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adagrad: g ← ±g + λθ;  s ← s + g²;  θ ← θ − η/(1 + (t − 1)δ) · g/(√s + ε).

    Source: torch.optim.Adagrad; Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and
    Stochastic Optimization", JMLR 12, 2011.
    """
    g = _descent(options, theta, gradient)
    kept = slots.get("sum")
    s = (torch.full_like(theta, options["initial_accumulator_value"]) if kept is None else kept).addcmul(g, g)
    rate = float(options["lr"] / (1 + (step - 1) * options["lr_decay"]))
    return theta.addcdiv(g, _root(s).add(options["eps"]), value=-rate), {"sum": s}


def _kept(slots: _Slots, name: str, theta: Tensor) -> Tensor:
    """Return a state tensor, which starts from 0."""
    return slots[name] if name in slots else torch.zeros_like(theta)


def _descent(options: _Options, theta: Tensor, gradient: Tensor) -> Tensor:
    """Return ±g + λθ: the gradient of what is minimised, the optimizer's L2 penalty included."""
    g = -gradient if options["maximize"] else gradient
    decay = options["weight_decay"]
    return g if decay == 0 else g.add(theta, alpha=float(decay))


def _root(x: Tensor) -> Tensor:
    """Return √x with all derivatives 0 at x = 0."""
    zero = x == 0
    # Twice: the derivative of the branch that is not taken must be finite too, for it is multiplied by 0.
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


_ADAM = _Rule(
    ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"),
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    _adam,
)
_RULES: Mapping[type[optim.Optimizer], _Rule] = {
    optim.SGD: _Rule(
        ("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize"),
        ("momentum_buffer",),
        _sgd,
        counts_steps=False,
    ),
    optim.Adam: _ADAM,
    optim.AdamW: _ADAM,
    optim.RMSprop: _Rule(
        ("lr", "alpha", "eps", "centered", "momentum", "weight_decay", "maximize"),
        ("grad_avg", "momentum_buffer", "square_avg"),
        _rmsprop,
    ),
    optim.Adagrad: _Rule(
        ("lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value", "maximize"), ("sum",), _adagrad
    ),
}
_IMPLICIT = "use a method that does not look at the steps (an implicit one such as mlo.ConjugateGradient)"


def _rule_of(optimizer: optim.Optimizer) -> _Rule:
    # By the exact class: a subclass may have another step().
    rule = _RULES.get(type(optimizer))
    if rule is None:
        *names, last = (known.__name__ for known in _RULES)
        raise ConfigurationError(
            f"the steps of the optimizer {type(optimizer).__module__}.{type(optimizer).__qualname__} cannot be "
            f"differentiated: supported are {', '.join(names)} and {last} of torch.optim themselves (no subclasses). "
            f"Use one of these, or {_IMPLICIT}."
        )
    return rule


def _options(optimizer: optim.Optimizer, group: Mapping[str, Any], rule: _Rule) -> dict[str, Any]:
    """Return the options of a group that matter, and copies of the tensors among them."""
    # AdamW of torch 2.6 does not have the option in its groups.
    given = {"decoupled_weight_decay": isinstance(optimizer, optim.AdamW), **group}
    if "initial_accumulator_value" in rule.options:
        # Where Adagrad has no state yet (a group added later), it looks here, not in the group.
        given["initial_accumulator_value"] = optimizer.defaults["initial_accumulator_value"]
    return {name: _constant(given[name]) for name in rule.options}


def _constant(value: Any) -> Any:
    """Return an option as no one can change it any more."""
    if isinstance(value, Sequence):
        return tuple(_constant(v) for v in value)
    if isinstance(value, Tensor):
        # On the CPU: one transfer when it is recorded, none for each parameter at each use.
        return value.detach().to("cpu", copy=True)
    return value


def _state(optimizer: optim.Optimizer, parameters: Sequence[Tensor], rule: _Rule) -> State:
    """Return the optimizer's own state tensors."""
    # Not by subscription, which would put an entry into the optimizer's state.
    entries: list[Mapping[str, Any]] = [optimizer.state.get(p, {}) for p in parameters]
    slots = [{name: e[name] for name in rule.slots if isinstance(e.get(name), Tensor)} for e in entries]
    return _as_state(slots, [int(e.get("step", 0)) for e in entries])
