"""The eight candidate operations of a DARTS cell (Liu, Simonyan and Yang, ICLR 2019, section 3).

An operation may serve several edges that leave the same node: all of them read the same input, so their
convolutions run as one grouped convolution with a group per edge, and what has no weights (pooling, identity)
runs once. The function and its weights are those of one module per edge; there are just fewer, larger kernels
(a small network spends most of its time on launching kernels).

Every operation maps (N, C, H, W) to (N, edges, C, ⌈H/stride⌉, ⌈W/stride⌉); one without weights returns 1 in place
of `edges`, for all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def normalisation(channels: int, derived: bool) -> nn.BatchNorm2d:
    """Return a batch normalisation.

    That of a supernet has no weights, as in DARTS, and always takes the statistics of the batch: running ones
    would lag behind an architecture that changes with every step.
    """
    return nn.BatchNorm2d(channels, affine=derived, track_running_stats=derived)


class Pool(nn.Module):
    """Pooling over 3×3; in a supernet with normalisation, so that all operations have the same scale."""

    def __init__(self, pool: nn.Module, channels: int, derived: bool) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.Identity() if derived else normalisation(channels, derived)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 1, C, H', W')."""
        return self.norm(self.pool(x)).unsqueeze(1)


class Identity(nn.Module):
    """The skip connection of stride 1; in a supernet with dropout, if asked for.

    Dropout keeps a search from preferring skips for their early ease (P-DARTS: Chen et al., ICCV 2019, section 3.3).
    """

    def __init__(self, edges: int) -> None:
        super().__init__()
        self.edges = edges
        self.dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 1, C, H, W), or (N, edges, C, H, W) where some of it is dropped, edge by edge."""
        x = x.unsqueeze(1)
        if self.training and self.dropout > 0:
            return F.dropout(x.expand(-1, self.edges, -1, -1, -1), self.dropout)
        return x


class FactorizedReduce(nn.Module):
    """The skip connection of stride 2: two 1×1 convolutions on grids shifted by one pixel, side by side."""

    def __init__(self, channels_in: int, channels_out: int, edges: int, derived: bool) -> None:
        super().__init__()
        self.edges = edges
        width = edges * (channels_out // 2)
        self.even = nn.Conv2d(channels_in, width, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(channels_in, width, 1, stride=2, bias=False)
        self.norm = normalisation(edges * channels_out, derived)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, edges, C, ⌈H/2⌉, ⌈W/2⌉)."""
        x = F.relu(x)
        halves = self.even(x), self.odd(F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:])
        joined = torch.cat([h.unflatten(1, (self.edges, -1)) for h in halves], dim=2)
        return self.norm(joined.flatten(1, 2)).unflatten(1, (self.edges, -1))


class ReluConvNorm(nn.Module):
    """ReLU, 1×1 convolution, normalisation: brings a cell's inputs to its width."""

    def __init__(self, channels_in: int, channels_out: int, derived: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.norm = normalisation(channels_out, derived)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, channels_out, H, W)."""
        return self.norm(self.conv(F.relu(x)))


class HalvedFit(FactorizedReduce):
    """Brings what is twice as large as a cell's other input to its resolution and width."""

    def __init__(self, channels_in: int, channels_out: int, derived: bool) -> None:
        super().__init__(channels_in, channels_out, 1, derived)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, channels_out, ⌈H/2⌉, ⌈W/2⌉)."""
        return super().forward(x).squeeze(1)


class SeparableConv(nn.Module):
    """ReLU, depthwise and pointwise convolution, normalisation; `times` in a row, the stride in the first."""

    def __init__(
        self, channels: int, kernel: int, stride: int, edges: int, derived: bool, *, dilation: int = 1, times: int = 1
    ) -> None:
        super().__init__()
        self.edges = edges
        width, padding = edges * channels, dilation * (kernel - 1) // 2
        layers: list[nn.Module] = []
        for i in range(times):
            layers += [
                nn.ReLU(),
                nn.Conv2d(
                    width,
                    width,
                    kernel,
                    stride=stride if i == 0 else 1,
                    padding=padding,
                    dilation=dilation,
                    groups=width,
                    bias=False,
                ),
                nn.Conv2d(width, width, 1, groups=edges, bias=False),
                normalisation(width, derived),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, edges, C, H', W')."""
        repeated = x.unsqueeze(1).expand(-1, self.edges, -1, -1, -1).flatten(1, 2)
        return self.layers(repeated).unflatten(1, (self.edges, -1))


def _skip(channels: int, stride: int, edges: int, derived: bool) -> nn.Module:
    return Identity(edges) if stride == 1 else FactorizedReduce(channels, channels, edges, derived)


#: name → constructor(channels, stride, edges, derived); `None` is the absent edge.
OPERATIONS: dict[str, Callable[[int, int, int, bool], nn.Module] | None] = {
    "none": None,
    "max_pool_3x3": lambda c, s, _, d: Pool(nn.MaxPool2d(3, stride=s, padding=1), c, d),
    "avg_pool_3x3": lambda c, s, _, d: Pool(nn.AvgPool2d(3, stride=s, padding=1, count_include_pad=False), c, d),
    "skip_connect": _skip,
    "sep_conv_3x3": lambda c, s, e, d: SeparableConv(c, 3, s, e, d, times=2),
    "sep_conv_5x5": lambda c, s, e, d: SeparableConv(c, 5, s, e, d, times=2),
    "dil_conv_3x3": lambda c, s, e, d: SeparableConv(c, 3, s, e, d, dilation=2),
    "dil_conv_5x5": lambda c, s, e, d: SeparableConv(c, 5, s, e, d, dilation=2),
}

OPERATION_NAMES = tuple(OPERATIONS)
