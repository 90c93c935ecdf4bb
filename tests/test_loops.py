"""A run of the engine equals a hand-written PyTorch loop of the same arithmetic, bit for bit."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

import mlo

STEPS = 5


def batches(seed, count=3):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 5, generator=g), torch.randint(0, 3, (16,), generator=g)) for _ in range(count)]


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


class Weighted(mlo.Problem):
    """Cross-entropy with a weight for each class, and a penalty: both learnt by the upper problem."""

    def training_step(self, batch):
        x, y = batch
        upper = self.deps.upper.params
        loss = (torch.sigmoid(upper["class_weight"])[y] * F.cross_entropy(self(x), y, reduction="none")).mean()
        loss = loss + F.softplus(upper["decay"]) * sum(p.square().sum() for p in self.params.values())
        if "previous" in self.deps:
            loss = loss + 0.3 * mlo.squared_distance(self.params, self.deps.previous.params)
        return loss


class Validation(mlo.Problem):
    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.deps.network(x), y)


def weights():
    return nn.ParameterDict({"class_weight": torch.zeros(3), "decay": torch.tensor(-3.0)})


def lower_loss(module, params, upper, batch, previous=None):
    """The loss of `Weighted` as a plain function of tensors."""
    x, y = batch
    output = torch.func.functional_call(
        module, dict(zip([n for n, _ in module.named_parameters()], params, strict=True)), (x,)
    )
    loss = (torch.sigmoid(upper[0])[y] * F.cross_entropy(output, y, reduction="none")).mean()
    loss = loss + F.softplus(upper[1]) * sum(p.square().sum() for p in params)
    if previous is not None:
        loss = loss + 0.3 * mlo.squared_distance(list(params), list(previous))
    return loss


def assert_equal(problem_module, own_module):
    for a, b in zip(problem_module.parameters(), own_module.parameters(), strict=True):
        assert torch.equal(a, b)


def two_modules(make):
    torch.manual_seed(5)
    a = make()
    torch.manual_seed(5)
    return a, make()


def test_two_levels_with_finite_differences():
    (net, net2), (upper, upper2) = two_modules(mlp), two_modules(weights)
    train, valid, epsilon, lr = batches(1), batches(2), 1e-3, 0.1
    stage = Weighted(
        "net",
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3),
        data=train,
        depends_on={"upper": "weights"},
        steps=2,
        hypergradient=mlo.FiniteDifference(epsilon=epsilon),
    )
    top = Validation(
        "weights",
        upper,
        optimizer=torch.optim.Adam(upper.parameters(), lr=0.05),
        data=valid,
        depends_on={"network": "net"},
    )
    mlo.Engine([stage, top]).run(STEPS)

    inner = torch.optim.SGD(net2.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
    outer = torch.optim.Adam(upper2.parameters(), lr=0.05)
    params, h = list(net2.parameters()), list(upper2.parameters())
    used = 0
    for step in range(STEPS):
        for _ in range(2):
            batch = train[used % len(train)]
            used += 1
            inner.zero_grad()
            lower_loss(net2, params, [t.detach() for t in h], batch).backward(inputs=params)
            inner.step()
        x, y = valid[step % len(valid)]
        c = torch.autograd.grad(F.cross_entropy(net2(x), y), params)
        length = math.hypot(*(torch.linalg.vector_norm(t).item() for t in c))
        e = epsilon / length
        sides = []
        for sign in (e, -e):
            shifted = [p.detach().add(d, alpha=sign) for p, d in zip(params, c, strict=True)]
            sides.append(torch.autograd.grad(lower_loss(net2, shifted, h, batch), h))
        for t, ahead, behind in zip(h, *sides, strict=True):
            t.grad = (ahead - behind) * (-lr * length / (2 * epsilon))
        outer.step()
    assert_equal(net, net2)
    assert_equal(upper, upper2)


def test_chain_of_three_with_neumann():
    terms, scale = 3, 0.2
    made = [two_modules(mlp) for _ in range(3)]
    upper, upper2 = two_modules(weights)
    train, valid = [batches(i) for i in range(3)], batches(9)
    names = ["s1", "s2", "s3"]
    stages = [
        Weighted(
            name,
            net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data=train[i],
            depends_on={"upper": "weights", **({"previous": names[i - 1]} if i else {})},
            hypergradient=mlo.Neumann(terms, scale, rtol=0.0),
        )
        for i, (name, (net, _)) in enumerate(zip(names, made, strict=True))
    ]
    top = Validation(
        "weights",
        upper,
        optimizer=torch.optim.SGD(upper.parameters(), lr=0.5, momentum=0.5),
        data=valid,
        depends_on={"network": "s3"},
    )
    mlo.Engine([*stages, top]).run(STEPS)

    nets = [net for _, net in made]
    params, h = [list(net.parameters()) for net in nets], list(upper2.parameters())
    inner = [torch.optim.SGD(p, lr=0.1) for p in params]
    outer = torch.optim.SGD(h, lr=0.5, momentum=0.5)
    for step in range(STEPS):
        for i in range(3):
            previous = [t.detach() for t in params[i - 1]] if i else None
            inner[i].zero_grad()
            lower_loss(nets[i], params[i], [t.detach() for t in h], train[i][step % 3], previous).backward(
                inputs=params[i]
            )
            inner[i].step()
        x, y = valid[step % 3]
        c = torch.autograd.grad(F.cross_entropy(nets[2](x), y), params[2])
        total = [None, None]
        for i in reversed(range(3)):
            inputs = [*(params[i - 1] if i else ()), *h]
            loss = lower_loss(nets[i], params[i], h, train[i][step % 3], params[i - 1] if i else None)
            g = torch.autograd.grad(loss, params[i], create_graph=True)
            adjoint, residual = list(c), list(c)
            for _ in range(terms - 1):
                product = torch.autograd.grad(g, params[i], residual, retain_graph=True)
                residual = [r.add(p, alpha=-scale) for r, p in zip(residual, product, strict=True)]
                adjoint = [a + r for a, r in zip(adjoint, residual, strict=True)]
            adjoint = [a * scale for a in adjoint]
            mixed = [-t for t in torch.autograd.grad(g, inputs, adjoint)]
            c, own = mixed[: len(mixed) - 2], mixed[-2:]
            total = [o if t is None else t + o for t, o in zip(total, own, strict=True)]
        for t, grad in zip(h, total, strict=True):
            t.grad = grad
        outer.step()
    for net, net2 in made:
        assert_equal(net, net2)
    assert_equal(upper, upper2)


class Scalarised(mlo.Problem):
    """A level of vectors whose loss is a plain function of its own and the others' vectors."""

    def __init__(self, name, function, value, lr, reads, **options):
        module = nn.ParameterDict({"v": value.clone()})
        super().__init__(
            name, module, optimizer=torch.optim.SGD(module.parameters(), lr=lr), depends_on=reads, **options
        )
        self.function = function

    def training_step(self, batch):
        return self.function(self.params["v"], *(self.deps[d].params["v"] for d in self.depends_on))


def leaf(t):
    return t.detach().requires_grad_()


grad = torch.autograd.grad


def three_levels(seed=0, n=4):
    """Losses of z (lowest), y and x, and where they start: y's loss reads z's response to y itself."""
    torch.manual_seed(seed)
    start = [torch.randn(n) for _ in range(3)]
    b, c = torch.randn(n, n), torch.randn(n, n)

    def low(z, y, x):
        return torch.cosh(z).sum() - z @ (b @ torch.sin(y) + torch.sin(x))

    def mid(y, z, x):
        return 0.5 * (z - 0.3 * y).square().sum() + torch.cosh(y).sum() - y @ (c @ x)

    def up(x, y, z):
        return (z**2).sum() + torch.sin(y).sum() + 0.5 * (x**2).sum()

    return start, low, mid, up


def run_three_levels(start, low, mid, up, lr, method_z, method_y):
    z, y, x = start
    levels = [
        Scalarised("z", low, z, lr, ["y", "x"], hypergradient=method_z),
        Scalarised("y", mid, y, lr, ["z", "x"], hypergradient=method_y),
        Scalarised("x", up, x, lr, ["y", "z"]),
    ]
    mlo.Engine(levels).run(STEPS)
    return [level.module["v"].detach() for level in levels]


def test_three_nested_levels():
    """The lowest stage by the identity, the middle one by two Neumann terms: one product with the reduced Hessian."""
    start, low, mid, up = three_levels()
    s, scale, lr = 0.1, 0.2, 0.05
    z, y, x = start

    def response_gradient(z, y, x):
        """∂low/∂z on fresh leaves, which come with it."""
        leaves = leaf(z), leaf(y), leaf(x)
        return *leaves, grad(low(*leaves), leaves[0], create_graph=True)[0]

    def pull_back(cotangent, z, y, x):
        """The rule of z's node: its cotangent's shares for y and x."""
        _, yl, xl, g = response_gradient(z, y, x)
        return [-t for t in grad(g, (yl, xl), s * cotangent)]

    def reduced_gradient(z, y, x):
        """r(y, x) = ∂mid/∂y + the share through z, and the function v → vᵀ ∂r/∂(y, x)."""
        zl, yl, xl = leaf(z), leaf(y), leaf(x)
        direct, q = grad(mid(yl, zl, xl), (yl, zl), create_graph=True)
        adjoint = s * q.detach()
        _, y1l, _, g = response_gradient(z, y, x)
        adjoint_leaf = leaf(adjoint)
        (mixed,) = grad(g, y1l, adjoint_leaf, create_graph=True)

        def product(v):
            y1, adjoint1 = grad(mixed, (y1l, adjoint_leaf), -v, retain_graph=True)
            mu = s * adjoint1  # the derivative of the solve is a solve
            z2l, _, _, g2 = response_gradient(z, y, x)
            (along,) = grad(g2, z2l, adjoint, create_graph=True)
            (z2,) = grad(along, z2l, mu)
            y3, z3, x3 = grad((direct, q), (yl, zl, xl), (v, mu), retain_graph=True)
            y4, x4 = pull_back(z3 - z2, z, y, x)  # z* moves with y and x
            return y3 + y1 + y4, x3 + x4

        return (direct - mixed).detach(), product

    def step(value, gradient):
        return value.add(gradient, alpha=-lr)

    for _ in range(STEPS):
        zl = leaf(z)
        z = step(z, grad(low(zl, y, x), zl)[0])
        y = step(y, reduced_gradient(z, y, x)[0])
        zl = leaf(z)
        z = step(z, grad(low(zl, y, x), zl)[0])
        xl, yl, zl = leaf(x), leaf(y), leaf(z)
        ux, uy, uz = grad(up(xl, yl, zl), (xl, yl, zl))
        zy, zx = pull_back(uz, z, y, x)
        cotangent = uy + zy
        _, product = reduced_gradient(z, y, x)
        residual = cotangent.add(product(cotangent)[0], alpha=-scale)
        adjoint = (cotangent + residual) * scale
        x = step(x, ux + (zx - product(adjoint)[1]))
    found = run_three_levels(start, low, mid, up, lr, mlo.Identity(s), mlo.Neumann(2, scale))
    for a, b in zip(found, (z, y, x), strict=True):
        assert torch.equal(a, b)


def test_three_nested_levels_term_by_term():
    """The same by forward derivatives in explicit matrices: other arithmetic, so that no bit is shared."""
    start, low, mid, up = three_levels(seed=1)
    s, lr = 0.1, 0.05
    z, y, x = start
    eye = torch.eye(len(x))

    def reduced_gradient(y, z, x, adjoint=None):
        """∂mid/∂y − (∂²low/∂z∂y)ᵀ a with a = s·∂mid/∂z, or another a."""
        a = s * torch.func.grad(mid, 1)(y, z, x) if adjoint is None else adjoint
        return torch.func.grad(mid, 0)(y, z, x) - torch.func.vjp(lambda y: torch.func.grad(low)(z, y, x), y)[1](a)[0]

    for _ in range(STEPS):
        z = z - lr * torch.func.grad(low)(z, y, x)
        y = y - lr * reduced_gradient(y, z, x)
        z = z - lr * torch.func.grad(low)(z, y, x)
        zx = torch.func.jacrev(torch.func.grad(low), 2)(z, y, x)
        zy = torch.func.jacrev(torch.func.grad(low), 1)(z, y, x)
        ux, uy, uz = torch.func.grad(up, (0, 1, 2))(x, y, z)
        adjoint_y = s * (uy - s * zy.T @ uz)
        a = s * torch.func.grad(mid, 1)(y, z, x)

        def moved(e, y=y, z=z, x=x, a=a, zx=zx):
            """The derivative of the reduced gradient as x moves along e, z and the inner adjoint with it."""
            dz = -s * zx @ e

            def q(t):
                return torch.func.grad(mid, 1)(y, z + t * dz, x + t * e)

            def along_hessian(t):
                return torch.func.hessian(low)(z + t * dz, y, x + t * e) @ a

            zero = torch.zeros(())
            da = s * (torch.func.jacfwd(q)(zero) - torch.func.jacfwd(along_hessian)(zero))
            return torch.func.jacfwd(lambda t: reduced_gradient(y, z + t * dz, x + t * e, a + t * da))(zero)

        implicit = torch.stack([adjoint_y @ moved(e) for e in eye])
        x = x - lr * (ux - s * zx.T @ uz - implicit)
    found = run_three_levels(start, low, mid, up, lr, mlo.Identity(s), mlo.Identity(s))
    for a, b in zip(found, (z, y, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
