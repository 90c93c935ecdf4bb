"""Problems whose solutions and hypergradients are known in closed form, by plain linear algebra."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mlo


def spd(n: int, *, shift: float = 1.0) -> Tensor:
    """A random symmetric matrix with eigenvalues of at least `shift`."""
    a = torch.randn(n, n)
    return a @ a.T / n + shift * torch.eye(n)


class Split(nn.Module):
    """n numbers kept in several tensors of different shapes, in nested containers, one of them 0-dim.

    Beside them a frozen tensor, and a trainable one that no loss reads.
    """

    def __init__(self, n: int):
        super().__init__()
        assert n >= 4
        self.scalar = nn.Parameter(torch.randn(()))
        self.inner = nn.ModuleDict({"deep": nn.ParameterList([torch.randn(2, 1)])})
        self.rest = nn.Parameter(torch.randn(n - 3))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))


USED = ("scalar", "rest", "inner.deep.0")


def flat(params) -> Tensor:
    """All numbers of a `Split` that a loss reads, in one vector."""
    return torch.cat([params[name].reshape(-1) for name in USED])


def assign(module: nn.Module, value: Tensor) -> None:
    """Set the numbers of a `Split` to `value`."""
    with torch.no_grad():
        start = 0
        for name in USED:
            p = module.get_parameter(name)
            p.copy_(value[start : start + p.numel()].reshape(p.shape))
            start += p.numel()


class Quadratic(mlo.Problem):
    """½ θᵀ A θ − θᵀ (Σ B_d θ_d + b), so that θ* = A⁻¹ (Σ B_d θ_d + b)."""

    def __init__(self, name, *, n=6, reads=(), hessian=None, size_of=None, **options):
        module = Split(n)
        options.setdefault("optimizer", torch.optim.SGD(module.parameters(), lr=0.1))
        super().__init__(name, module, depends_on=reads, **options)
        self.n = n
        self.hessian = spd(n) if hessian is None else hessian
        self.couplings = {d: 0.5 * torch.randn(n, (size_of or {}).get(d, n)) for d in reads}
        self.offset = torch.randn(n)

    def right_side(self, values) -> Tensor:
        return self.offset + sum((b @ values[d] for d, b in self.couplings.items()), torch.zeros(self.n))

    def training_step(self, batch):
        theta = flat(self.params)
        values = {d: flat(self.deps[d].params) for d in self.couplings}
        return 0.5 * theta @ self.hessian @ theta - theta @ self.right_side(values)


class Target(mlo.Problem):
    """½ xᵀ C x + Σ ½‖θ_d − t_d‖² + xᵀ D_d θ_d: an upper problem that reads some stages and itself."""

    def __init__(self, name="top", *, n=6, reads=(), **options):
        module = Split(n)
        options.setdefault("optimizer", torch.optim.SGD(module.parameters(), lr=0.1))
        super().__init__(name, module, depends_on=reads, **options)
        self.n = n
        self.curvature = spd(n)
        self.targets = {d: torch.randn(n) for d in reads}
        self.mixed = {d: torch.randn(n, n) for d in reads}

    def training_step(self, batch):
        x = flat(self.params)
        loss = 0.5 * x @ self.curvature @ x
        for d, target in self.targets.items():
            theta = flat(self.deps[d].params)
            loss = loss + 0.5 * (theta - target).square().sum() + x @ self.mixed[d] @ theta
        return loss

    def direct(self, x, values):
        """∂L/∂x and ∂L/∂θ_d."""
        own = self.curvature @ x + sum((m @ values[d] for d, m in self.mixed.items()), torch.zeros(self.n))
        return own, {d: values[d] - t + self.mixed[d].T @ x for d, t in self.targets.items()}


def solve_in_order(stages, top) -> dict[str, Tensor]:
    """Set every stage to its solution, given the upper problem and the stages before; return all values."""
    values = {top.name: flat(dict(top.module.named_parameters()))}
    for stage in stages:
        values[stage.name] = torch.linalg.solve(stage.hessian, stage.right_side(values)).detach()
        assign(stage.module, values[stage.name])
    return {name: v.detach() for name, v in values.items()}


def exact_hypergradient(stages, top, inverse=None) -> Tensor:
    """The closed form by the reverse sweep in plain matrices; `inverse(stage)` replaces A⁻¹ where given."""
    values = solve_in_order(stages, top)
    total, cotangents = top.direct(values[top.name], values)
    cotangents = {s.name: cotangents.get(s.name, torch.zeros(s.n)) for s in stages}
    for stage in reversed(stages):
        a = torch.linalg.inv(stage.hessian) if inverse is None else inverse(stage)
        adjoint = a.T @ cotangents[stage.name]
        for d, b in stage.couplings.items():
            if d == top.name:
                total = total + b.T @ adjoint
            else:
                cotangents[d] = cotangents[d] + b.T @ adjoint
    return total


def by_engine(engine, top) -> Tensor:
    """The engine's hypergradient in one vector, after a check of the parameters that take no part."""
    found = engine.hypergradient(top.name)
    assert "frozen" not in found
    assert torch.equal(found["unused"], torch.zeros(3))
    return flat(found)


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --- topologies: each returns the stages in solve order and the upper problem ---------------------------------


def two_levels(method, **options):
    top = Target(reads=["w"])
    return [Quadratic("w", reads=["top"], hypergradient=method, **options)], top


def chain(method, length=6, top_reads=None, **options):
    names = [f"w{i}" for i in range(1, length + 1)]
    stages = [
        Quadratic(name, reads=["top", *names[max(0, i - 1) : i]], hypergradient=method, **options)
        for i, name in enumerate(names)
    ]
    return stages, Target(reads=names[-1:] if top_reads is None else top_reads(names))


def diamond(method, **options):
    stages = [
        Quadratic("base", reads=["top"], hypergradient=method, **options),
        Quadratic("left", reads=["base"], hypergradient=method, **options),
        Quadratic("right", reads=["base", "top"], hypergradient=method, **options),
        Quadratic("join", reads=["left", "right"], hypergradient=method, **options),
    ]
    return stages, Target(reads=["join"])


def dense(method, length=5, **options):
    names = [f"w{i}" for i in range(1, length + 1)]
    stages = [Quadratic(n, reads=["top", *names[:i]], hypergradient=method, **options) for i, n in enumerate(names)]
    return stages, Target(reads=names)


TOPOLOGIES = {"two_levels": two_levels, "chain": chain, "diamond": diamond, "dense": dense}
