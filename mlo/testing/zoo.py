"""Problems with known exact hypergradients: every corner that a method must get right.

Each function returns the same `KnownProblem` at each call; data come from generators of their own with fixed seeds.
Nothing here uses the engine or a method for its exact answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from mlo.errors import ConfigurationError
from mlo.options import is_count, is_number
from mlo.testing.known_problem import KnownProblem, known, known_nested
from mlo.testing.level import Level, with_gradient
from mlo.testing.reference import eliminated

Vectors = Mapping[str, Tensor]

_SIZE = 6
_NESTED_SIZE = 3


class _Random:
    """Random tensors in float64 from a generator of its own."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def rotation(self, n: int) -> Tensor:
        rotation: Tensor = torch.linalg.qr(self.normal(n, n)).Q
        return rotation

    def with_eigenvalues(self, eigenvalues: Tensor) -> Tensor:
        """Return a symmetric matrix."""
        q = self.rotation(len(eigenvalues))
        return q @ torch.diag(eigenvalues) @ q.T

    def definite(self, n: int) -> Tensor:
        """Return a symmetric matrix with eigenvalues from 1 to 5."""
        return self.with_eigenvalues(torch.linspace(1.0, 5.0, n, dtype=torch.float64))


# --- building blocks -------------------------------------------------------------------------------------------


def _quadratic(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
    """½ θᵀAθ − θᵀ(b + Σ B_d θ_d)."""
    return 0.5 * own @ c["A"] @ own - own @ _pull(others, c)


def _pull(others: Vectors, c: Vectors) -> Tensor:
    total = c["b"]
    for d, v in others.items():
        total = total + c[f"B_{d}"] @ v
    return total


def _curved(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
    """The quadratic with Σ cosh(θ/2) + θ⁴/24, and bent couplings."""
    bent = {d: torch.sin(v) for d, v in others.items()}
    return _quadratic(own, bent, c) + torch.cosh(0.5 * own).sum() + own.pow(4).sum() / 24


def _target(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
    """½ xᵀCx + Σ ½‖θ_d − t_d‖² + xᵀ D_d θ_d: the upper problem reads itself and some stages."""
    loss = 0.5 * own @ c["C"] @ own
    for d, v in others.items():
        cross = own @ c[f"D_{d}"] @ v
        loss = loss + 0.5 * (v - c[f"t_{d}"]).square().sum() + cross
    return loss


def _stage(
    r: _Random,
    name: str,
    reads: Mapping[str, int],
    *,
    size: int = _SIZE,
    hessian: Tensor | None = None,
    loss: Callable[[Tensor, Vectors, Vectors], Tensor] = _quadratic,
    pull: float = 1.0,
    decay: float = 0.0,
    maximise: bool = False,
) -> Level:
    constants = {"A": r.definite(size) if hessian is None else hessian, "b": pull * r.normal(size)}
    constants |= {f"B_{d}": pull * 0.5 * r.normal(size, n) for d, n in reads.items()}
    start = torch.zeros(size, dtype=torch.float64)
    return Level(name, tuple(reads), loss, start, constants, decay=decay, maximise=maximise)


def _top(r: _Random, reads: Mapping[str, int], *, size: int = _SIZE, name: str = "top") -> Level:
    constants = {"C": 0.1 * r.definite(size)}
    constants |= {f"t_{d}": r.normal(n) for d, n in reads.items()}
    constants |= {f"D_{d}": 0.5 * r.normal(size, n) for d, n in reads.items()}
    return Level(name, tuple(reads), _target, r.normal(size), constants)


def _two_levels(name: str, r: _Random, *tags: str, hessian: Tensor, pull: float = 1.0) -> KnownProblem:
    stage = _stage(r, "w", {"top": _SIZE}, hessian=hessian, pull=pull)
    return known(name, [stage, _top(r, {"w": _SIZE})], "quadratic", *tags)


_USUAL = ("symmetric", "definite")


def _kind(quadratic: bool) -> tuple[str, Callable[[Tensor, Vectors, Vectors], Tensor]]:
    return ("quadratic", _quadratic) if quadratic else ("non_quadratic", _curved)


# --- two levels ------------------------------------------------------------------------------------------------


@cache
def ridge() -> KnownProblem:
    """Ridge regression with one penalty per coordinate, by its closed form.

    w*(λ) = (XᵀX/m + diag λ)⁻¹ Xᵀy/m, so that dF/dλᵢ = −wᵢ [(XᵀX/m + diag λ)⁻¹ ∂F/∂w]ᵢ.
    """
    r = _Random(1)
    n, m = 8, 20
    data = {"X": r.normal(m, n), "y": r.normal(m)}
    held_out = {"X": r.normal(m, n), "y": r.normal(m)}

    def train(w: Tensor, others: Vectors, c: Vectors) -> Tensor:
        fit = 0.5 * (c["X"] @ w - c["y"]).square().mean()
        return fit + 0.5 * (others["penalties"] * w.square()).sum()

    def validation(_: Tensor, others: Vectors, c: Vectors) -> Tensor:
        return 0.5 * (c["X"] @ others["w"] - c["y"]).square().mean()

    def closed_form(levels: list[Level]) -> Tensor:
        penalties = levels[-1].start
        matrix = data["X"].T @ data["X"] / m + torch.diag(penalties)
        w = torch.linalg.solve(matrix, data["X"].T @ data["y"] / m)
        slope = held_out["X"].T @ (held_out["X"] @ w - held_out["y"]) / m
        adjoint = torch.linalg.solve(matrix, slope)
        return torch.neg(w * adjoint)

    levels = [
        Level("w", ("penalties",), train, torch.zeros(n, dtype=torch.float64), data),
        Level("penalties", ("w",), validation, 0.1 + r.normal(n).square(), held_out),
    ]
    return known("ridge", levels, "quadratic", *_USUAL, gradient=closed_form)


@cache
def logistic() -> KnownProblem:
    """Logistic regression with one penalty exp(λᵢ) per coordinate, by dense implicit differentiation."""
    r = _Random(2)
    n, m = 6, 40
    truth = r.normal(n)

    def sample() -> dict[str, Tensor]:
        x = r.normal(m, n)
        return {"X": x, "y": torch.sign(x @ truth + r.normal(m))}

    def log_loss(w: Tensor, c: Vectors) -> Tensor:
        return F.softplus(-c["y"] * (c["X"] @ w)).mean()

    def train(w: Tensor, others: Vectors, c: Vectors) -> Tensor:
        return log_loss(w, c) + 0.5 * (others["penalties"].exp() * w.square()).sum()

    def validation(_: Tensor, others: Vectors, c: Vectors) -> Tensor:
        return log_loss(others["w"], c)

    levels = [
        Level("w", ("penalties",), train, torch.zeros(n, dtype=torch.float64), sample()),
        Level("penalties", ("w",), validation, r.normal(n) - 2, sample()),
    ]
    return known("logistic", levels, "non_quadratic", *_USUAL)


@cache
def scalar() -> KnownProblem:
    """One number at each level, kept in a 0-dim tensor; the stage is not quadratic."""
    r = _Random(3)
    stage = _stage(r, "w", {"top": 1}, size=1, loss=_curved)
    return known("scalar", [stage, _top(r, {"w": 1}, size=1)], "non_quadratic", *_USUAL)


@cache
def multiple_of_identity(c: float = 2.0) -> KnownProblem:
    """H = c·I: one eigenvalue, at which some solvers divide zero by zero after their first step."""
    if not is_number(c) or c <= 0:
        raise ConfigurationError(f"multiple_of_identity(c={c!r}): expected a positive number.")
    hessian = c * torch.eye(_SIZE, dtype=torch.float64)
    return _two_levels(f"multiple_of_identity({c:g})", _Random(4), *_USUAL, hessian=hessian, pull=float(c))


@cache
def repeated_eigenvalues() -> KnownProblem:
    """Two eigenvalues, each three times."""
    r = _Random(5)
    hessian = r.with_eigenvalues(torch.tensor([1.0, 1, 1, 4, 4, 4], dtype=torch.float64))
    return _two_levels("repeated_eigenvalues", r, *_USUAL, hessian=hessian)


@cache
def ill_conditioned(condition: float = 1e4) -> KnownProblem:
    """Eigenvalues spaced evenly on a logarithmic scale, the largest 1 and the smallest 1/condition.

    The upper loss is made such that its cotangent is c = H v, for v with entries about 1. So λ = v is known, the
    hypergradient is ∂F/∂x + Bᵀv, and a residual r of the solve becomes an error of up to condition·r: with c at random,
    the solution would be nearly parallel to one eigenvector, and easy to find.
    """
    if not is_number(condition) or condition < 1:
        raise ConfigurationError(f"ill_conditioned(condition={condition!r}): expected a number of at least 1.")
    r = _Random(6)
    exponents = torch.linspace(0.0, 1.0, _SIZE, dtype=torch.float64)
    hessian = r.with_eigenvalues(float(condition) ** -exponents)
    stage, top = _stage(r, "w", {"top": _SIZE}, hessian=hessian), _top(r, {"w": _SIZE})
    x, solution, adjoint = top.start, r.normal(_SIZE), r.normal(_SIZE)
    c, f = stage.constants, top.constants
    stage = replace(stage, start=solution, constants={**c, "b": hessian @ solution - c["B_top"] @ x})
    top = replace(top, constants={**f, "t_w": solution + f["D_w"].T @ x - hessian @ adjoint})
    gradient = f["C"] @ x + f["D_w"] @ solution + c["B_top"].T @ adjoint
    tags = frozenset({"quadratic", "ill_conditioned", *_USUAL})
    return KnownProblem(f"ill_conditioned({condition:.0e})", (stage, top), gradient, tags, float(condition))


@cache
def indefinite() -> KnownProblem:
    """A stage at a saddle point: eigenvalues of both signs."""
    r = _Random(7)
    hessian = r.with_eigenvalues(torch.tensor([-3.0, -1.5, -0.5, 0.7, 2.0, 4.0], dtype=torch.float64))
    return _two_levels("indefinite", r, "symmetric", hessian=hessian)


def _game(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
    """A loss whose gradient in θ is Aθ + sin θ + R(θ + θ²/4) − (b + Σ B_d θ_d), with R skew-symmetric.

    Neither its Jacobian nor the derivative of that is symmetric.
    """
    return with_gradient(own, _game_field(own, c)) - own @ _pull(others, c)


def _game_gradient(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
    return _game_field(own, c) - _pull(others, c)


def _game_field(own: Tensor, c: Vectors) -> Tensor:
    return c["A"] @ own + torch.sin(own) + c["R"] @ (own + own.square() / 4)


def _game_level(r: _Random, name: str, reads: Mapping[str, int], size: int) -> Level:
    skew = r.normal(size, size)
    constants = {"A": r.definite(size), "R": skew - skew.T, "b": r.normal(size)}
    constants |= {f"B_{d}": 0.5 * r.normal(size, n) for d, n in reads.items()}
    start = torch.zeros(size, dtype=torch.float64)
    return Level(name, tuple(reads), _game, start, constants, stationarity=_game_gradient)


@cache
def non_symmetric() -> KnownProblem:
    """A stage that is an equilibrium, not a minimum: its gradient is no gradient of a function, J ≠ Jᵀ."""
    r = _Random(8)
    stage = _game_level(r, "w", {"top": _SIZE}, _SIZE)
    return known("non_symmetric", [stage, _top(r, {"w": _SIZE})], "non_quadratic", "definite")


@cache
def weight_decay() -> KnownProblem:
    """A chain of two stages, the first with an L2 decay in its optimizer, the second maximised with one."""
    r = _Random(9)
    first = _stage(r, "w1", {"top": _SIZE}, decay=0.7)
    second = _stage(r, "w2", {"top": _SIZE, "w1": _SIZE}, hessian=-r.definite(_SIZE), decay=0.4, maximise=True)
    return known("weight_decay", [first, second, _top(r, {"w2": _SIZE})], "quadratic", *_USUAL)


# --- graphs without nesting ------------------------------------------------------------------------------------


@cache
def chain(length: int = 4, *, quadratic: bool = True) -> KnownProblem:
    """`length` stages, each reading the one before and the upper problem, which reads the last."""
    _check_length("chain", length, 1)
    r, (kind, loss) = _Random(10), _kind(quadratic)
    names = [f"w{i}" for i in range(1, length + 1)]
    reads = [{"top": _SIZE, **dict.fromkeys(names[max(0, i - 1) : i], _SIZE)} for i in range(length)]
    levels = [_stage(r, name, read, loss=loss) for name, read in zip(names, reads, strict=True)]
    title = f"chain({length})" if quadratic else f"chain({length}, non-quadratic)"
    return known(title, [*levels, _top(r, {names[-1]: _SIZE})], kind, *_USUAL)


@cache
def diamond(*, quadratic: bool = True) -> KnownProblem:
    """Four stages: base, left and right over it, join over both; of different sizes."""
    r, (kind, loss) = _Random(11), _kind(quadratic)
    levels = [
        _stage(r, "base", {"top": 6}, size=5, loss=loss),
        _stage(r, "left", {"base": 5}, size=4, loss=loss),
        _stage(r, "right", {"base": 5, "top": 6}, size=7, loss=loss),
        _stage(r, "join", {"left": 4, "right": 7}, size=6, loss=loss),
    ]
    title = "diamond" if quadratic else "diamond(non-quadratic)"
    return known(title, [*levels, _top(r, {"join": 6})], kind, *_USUAL)


@cache
def dense_graph(length: int = 4) -> KnownProblem:
    """`length` stages, each reading all before it and the upper problem, which reads all."""
    _check_length("dense_graph", length, 1)
    r = _Random(12)
    names = [f"w{i}" for i in range(1, length + 1)]
    levels = [_stage(r, n, {"top": _SIZE, **dict.fromkeys(names[:i], _SIZE)}) for i, n in enumerate(names)]
    return known(f"dense_graph({length})", [*levels, _top(r, dict.fromkeys(names, _SIZE))], "quadratic", *_USUAL)


# --- nested levels ---------------------------------------------------------------------------------------------


@cache
def nested_quadratic(depth: int = 3) -> KnownProblem:
    """`depth` levels with losses that are quadratic in all numbers at once, by elimination level after level."""
    _check_length("nested_quadratic", depth, 2)
    r, n = _Random(13), _NESTED_SIZE
    names = [f"t{i}" for i in range(depth, 0, -1)]
    quadratics = {name: (r.definite(n * depth), r.normal(n * depth)) for name in names}

    def loss_of(name: str) -> Callable[[Tensor, Vectors, Vectors], Tensor]:
        def loss(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
            v = torch.cat([own if d == name else others[d] for d in names])
            return 0.5 * v @ c["Q"] @ v + c["b"] @ v

        return loss

    solution = eliminated(list(quadratics.values()), r.normal(n))
    levels = tuple(
        Level(name, tuple(d for d in names if d != name), loss_of(name), start, {"Q": q, "b": b})
        for name, start, (q, b) in zip(names, torch.split(solution.values, n), quadratics.values(), strict=True)
    )
    tags = frozenset({"nested", "quadratic", *_USUAL, *_depth_tag(depth)})
    return KnownProblem(f"nested_quadratic({depth})", levels, solution.gradient, tags, solution.condition)


def _nested_curved(name: str, names: list[str]) -> Callable[[Tensor, Vectors, Vectors], Tensor]:
    below = names[: names.index(name)]

    def loss(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
        total = _curved(own, others, c)
        for d in below:  # a lower level also enters by its distance
            total = total + 0.3 * (others[d] - 0.3 * own).square().sum()
        return total

    return loss


@cache
def nested(depth: int = 3) -> KnownProblem:
    """`depth` levels that are not quadratic, each reading all others, by dense recursion.

    Here the sum over paths with partial Hessians is wrong: a stage's Hessian must be that of its reduced loss.
    """
    _check_length("nested", depth, 2)
    r, n = _Random(14), _NESTED_SIZE
    names = [f"t{i}" for i in range(depth, 0, -1)]
    others = {name: {d: n for d in names if d != name} for name in names}
    stages = [_stage(r, name, others[name], size=n, loss=_nested_curved(name, names)) for name in names[:-1]]
    levels = [*stages, _top(r, others["t1"], size=n, name="t1")]
    return known_nested(f"nested({depth})", levels, "non_quadratic", *_USUAL, *_depth_tag(depth))


def _depth_tag(depth: int) -> tuple[str, ...]:
    return ("deep",) if depth > 3 else ()


@cache
def nested_non_symmetric(depth: int = 3) -> KnownProblem:
    """`depth` levels of which the lowest is a game: second derivatives need the transposed operator.

    With four levels a derivative of the transposed solve is taken, too.
    """
    _check_length("nested_non_symmetric", depth, 3)
    r, n = _Random(15), _NESTED_SIZE
    names = [f"t{i}" for i in range(depth, 0, -1)]
    others = {name: {d: n for d in names if d != name} for name in names}
    low = _game_level(r, names[0], others[names[0]], n)
    middle = [_stage(r, name, others[name], size=n, loss=_nested_curved(name, names)) for name in names[1:-1]]
    levels = [low, *middle, _top(r, others["t1"], size=n, name="t1")]
    title = "nested_non_symmetric" if depth == 3 else f"nested_non_symmetric({depth})"
    return known_nested(title, levels, "non_quadratic", "definite", *_depth_tag(depth))


def all_problems() -> tuple[KnownProblem, ...]:
    """Return every problem of the zoo, the larger families by some of their members.

    Cost: a few seconds at the first call.
    """
    return (
        ridge(),
        logistic(),
        scalar(),
        multiple_of_identity(1.0),
        multiple_of_identity(2.0),
        multiple_of_identity(1e-3),
        multiple_of_identity(1e4),
        repeated_eigenvalues(),
        ill_conditioned(1e2),
        ill_conditioned(1e4),
        ill_conditioned(1e6),
        indefinite(),
        non_symmetric(),
        weight_decay(),
        chain(1),
        chain(2, quadratic=False),
        chain(6),
        diamond(),
        diamond(quadratic=False),
        dense_graph(5),
        nested_quadratic(3),
        nested_quadratic(4),
        nested(3),
        nested(4),
        nested_non_symmetric(),
    )


def _check_length(function: str, length: object, least: int) -> None:
    if not is_count(length) or length < least:  # type: ignore[operator]
        raise ConfigurationError(f"{function}({length!r}): expected an integer of at least {least}.")
