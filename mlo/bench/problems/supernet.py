"""A DARTS search in small: a network of mixed operations, and architecture parameters above it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlo.bench.problems.family import Family, Request, seeded
from mlo.bench.stage import Case, Stage, View

_CELLS, _NODES, _BATCH = 4, 2, 32
# (side of the images, channels of the first cell)
_SIZES = {"small": (8, 8), "medium": (16, 16)}


def _normalised(*layers: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(*layers, nn.BatchNorm2d(channels, affine=False))


class _Zero(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self._stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self._stride, :: self._stride])


def _operations(channels: int, stride: int) -> list[nn.Module]:
    """Return the candidates of an edge: none, skip, max and average pooling, separable and dilated convolution."""
    c = channels
    skip: nn.Module = nn.Identity()
    if stride != 1:
        skip = _normalised(nn.ReLU(), nn.Conv2d(c, c, 1, stride, bias=False), channels=c)

    def depthwise(dilation: int) -> nn.Module:
        spatial = nn.Conv2d(c, c, 3, stride, dilation, dilation, groups=c, bias=False)
        return _normalised(nn.ReLU(), spatial, nn.Conv2d(c, c, 1, bias=False), channels=c)

    return [
        _Zero(stride),
        skip,
        _normalised(nn.MaxPool2d(3, stride, 1), channels=c),
        _normalised(nn.AvgPool2d(3, stride, 1, count_include_pad=False), channels=c),
        depthwise(1),
        depthwise(2),
    ]


class _Cell(nn.Module):
    """Two inputs, brought to the same shape, and nodes that add mixtures of all before them."""

    def __init__(self, before: int, previous: int, channels: int, *, reduction: bool, halved: bool) -> None:
        super().__init__()
        stride = 2 if reduction else 1

        def brought(inputs: int, step: int) -> nn.Module:
            return _normalised(nn.ReLU(), nn.Conv2d(inputs, channels, 1, step, bias=False), channels=channels)

        self.first, self.second = brought(before, 2 if halved else 1), brought(previous, 1)
        self.edges = nn.ModuleList(
            nn.ModuleList(_operations(channels, stride if source < 2 else 1))
            for node in range(_NODES)
            for source in range(2 + node)
        )

    def forward(self, before: Tensor, previous: Tensor, weights: Tensor) -> Tensor:
        states = [self.first(before), self.second(previous)]
        edges = iter(zip(weights, self.edges, strict=True))
        for _ in range(_NODES):
            node = sum(_mixed(state, *next(edges)) for state in states)
            assert isinstance(node, Tensor)
            states.append(node)
        return torch.cat(states[-_NODES:], 1)


def _mixed(state: Tensor, weights: Tensor, operations: Any) -> Any:
    return sum(weight * operation(state) for weight, operation in zip(weights, operations, strict=True))


class Supernet(nn.Module):
    """A stem, four cells of which the third halves the image, and a classifier; called with the edges' parameters."""

    def __init__(self, channels: int) -> None:
        """Build the layers."""
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        before = previous = width = channels
        cells, halved = [], False
        for i in range(_CELLS):
            reduction = i == _CELLS // 2
            width = 2 * width if reduction else width
            cells.append(_Cell(before, previous, width, reduction=reduction, halved=halved))
            before, previous, halved = previous, _NODES * width, reduction
        self.cells = nn.ModuleList(cells)
        self.classifier = nn.Linear(previous, 10)

    def forward(self, x: Tensor, alphas: Tensor) -> Tensor:
        """Return the logits."""
        weights = alphas.softmax(-1)
        before = previous = self.stem(x)
        for cell in self.cells:
            before, previous = previous, cell(before, previous, weights)
        logits: Tensor = self.classifier(previous.mean((2, 3)))
        return logits


def _train(own: View, others: Mapping[str, View], batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(own(x, others["architecture"].params["alphas"]), y)


def _validate(own: View, others: Mapping[str, View], batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(others["network"](x, own.params["alphas"]), y)


def _images(side: int, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return batches of noise with a bright square whose place is the class."""
    batches = []
    for _ in range(4):
        x = torch.randn(_BATCH, 3, side, side, generator=generator, dtype=torch.float64)
        y = torch.randint(10, (_BATCH,), generator=generator)
        for image, label in zip(x, y.tolist(), strict=True):
            row, column = divmod(label, 4)
            image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 2
        batches.append((x, y))
    return tuple(batches)


def build(request: Request) -> Case:
    """Return the case at random weights."""
    side, channels = _SIZES[request.size]
    generator = torch.Generator().manual_seed(request.seed)
    edges = sum(2 + node for node in range(_NODES))
    alphas = 1e-3 * torch.randn(edges, 6, generator=generator, dtype=torch.float64)
    stages = (
        Stage(
            "network",
            seeded(lambda: Supernet(channels), request.seed),
            _train,
            ("architecture",),
            batches=_images(side, generator),
            learning_rate=0.025,
            momentum=0.9,
        ),
        Stage(
            "architecture",
            lambda: nn.ParameterDict({"alphas": nn.Parameter(alphas.clone())}),
            _validate,
            ("network",),
            batches=_images(side, generator),
            learning_rate=3e-4,
            optimizer="adam",
        ),
    )
    return Case("supernet", request.size, stages)


FAMILY = Family("supernet", "one DARTS step: a supernet of four cells", tuple(_SIZES), build)
