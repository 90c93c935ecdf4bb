"""JAXopt: implicit differentiation of a root in JAX, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch

from mlo.bench.libraries.peer import Peer, load, quietly
from mlo.bench.specification import Method
from mlo.bench.stage import Case, Gradient

#: A loss of (lower parameters, upper parameters, batch), in JAX.
_Loss = Callable[[Any, Any, Any], Any]


class JAXopt(Peer):
    """`jaxopt.implicit_diff.custom_root` with its linear solvers, `GradientDescent` for unrolling, under `jax.jit`.

    The losses are written out in JAX here, for the problems that are named below. It runs in this process: a call
    through a pipe to another one would take longer than many of the calls. A call of torch right after one of JAX is
    slower (measured: by 3 to 18 %, with a pipe by 10 to 13 %); an untimed one in between takes that away.
    """

    name = "jaxopt"
    module = "jaxopt"
    distribution = "jaxopt"
    install = "pip install jaxopt"
    kinds = ("cg", "gmres", "dense", "unroll")
    countable: ClassVar[bool] = False
    passes_countable: ClassVar[bool] = False

    def refuses(self, case: Case, method: Method) -> str | None:
        """Return what it lacks, or that the problem is not written out."""
        if case.name not in _LOSSES:
            return f"only {' and '.join(_LOSSES)} are written in JAX here"
        if next(case.upper.module().parameters()).device.type != "cpu":
            return "JAX is run on the CPU only"
        return super().refuses(case, method)

    def hypergradient(self, case: Case, method: Method) -> Callable[[], Gradient]:
        """Return the compiled derivative of the upper loss."""
        jax, ravel_pytree = load("jax"), load("jax.flatten_util").ravel_pytree
        jax.config.update("jax_enable_x64", True)  # float32 stays what it is
        lower, upper = case.stages
        train, validate = _LOSSES[case.name]()
        below, above = _arrays(lower.module()), _arrays(upper.module())
        given, held_out = _converted(lower.batches[0]), _converted(upper.batches[0])
        weights, named = ravel_pytree(below)

        def lower_loss(w: Any, x: Any) -> Any:
            return train(named(w), x, given)

        if method.kind == "unroll":
            solution = _descent(lower_loss, ravel_pytree(_arrays(lower.beginning()))[0], lower.factor, method)
        else:
            solution = _root(jax.grad(lower_loss), weights, method)
        compiled = jax.jit(jax.grad(lambda x: validate(named(solution(x)), x, held_out)))
        with quietly():
            jax.block_until_ready(compiled(above))

        def computed() -> Gradient:
            return {name: torch.from_numpy(np.array(g)) for name, g in compiled(above).items()}

        return computed


def _root(optimality: Any, weights: Any, method: Method) -> Callable[[Any], Any]:
    """Return the weights as a root of `optimality`, differentiated by the method."""
    implicit_diff, linear_solve = load("jaxopt.implicit_diff"), load("jaxopt.linear_solve")
    budget = method.budget or 1

    def solve(product: Any, rhs: Any) -> Any:
        if method.kind == "cg":
            return linear_solve.solve_cg(product, rhs, maxiter=budget, tol=0.0)
        if method.kind == "gmres":
            return linear_solve.solve_gmres(product, rhs, restart=budget, maxiter=1, tol=0.0)
        return linear_solve.solve_lu(product, rhs)

    root = implicit_diff.custom_root(optimality, solve=solve)(lambda _initial, _x: weights)
    return lambda x: root(None, x)


def _descent(loss: Any, start: Any, factor: float, method: Method) -> Callable[[Any], Any]:
    """Return the weights after gradient descent, differentiated through."""
    jaxopt = load("jaxopt")
    with quietly():
        solver = jaxopt.GradientDescent(
            loss,
            maxiter=method.budget or 1,
            tol=0.0,
            stepsize=factor,
            acceleration=False,
            implicit_diff=False,
            unroll=True,
        )
    return lambda x: solver.run(start, x).params


def _arrays(module: torch.nn.Module) -> dict[str, Any]:
    return {name: _converted(p.detach()) for name, p in module.named_parameters()}


def _converted(value: Any) -> Any:
    """Return the tensors of a batch as arrays."""
    jax = load("jax")
    return jax.tree.map(lambda t: jax.numpy.asarray(t.numpy()), value)


def _ridge() -> tuple[_Loss, _Loss]:
    jnp = load("jax.numpy")

    def train(below: Any, above: Any, batch: Any) -> Any:
        x, y = batch
        w = below["w"]
        return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * jnp.sum(jnp.exp(above["log"]) * w**2)

    def validate(below: Any, _above: Any, batch: Any) -> Any:
        x, y = batch
        return 0.5 * jnp.mean((x @ below["w"] - y) ** 2)

    return train, validate


def _logistic() -> tuple[_Loss, _Loss]:
    jax, jnp = load("jax"), load("jax.numpy")

    def cross_entropy(below: Any, batch: Any) -> Any:
        x, y = batch
        scores = jax.nn.log_softmax(x @ below["weight"].T + below["bias"])
        return -jnp.mean(jnp.take_along_axis(scores, y[:, None], axis=1))

    def train(below: Any, above: Any, batch: Any) -> Any:
        penalty = sum(jnp.sum(jnp.exp(above[name]) * w**2) for name, w in below.items())
        return cross_entropy(below, batch) + 0.5 * penalty

    return train, lambda below, _above, batch: cross_entropy(below, batch)


_LOSSES: dict[str, Callable[[], tuple[_Loss, _Loss]]] = {"ridge": _ridge, "logistic": _logistic}
