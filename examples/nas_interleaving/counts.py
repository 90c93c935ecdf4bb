"""The size of a network, as papers count it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

#: What begins the names of parameters that only training uses.
AUXILIARY = "auxiliary."


def count_parameters(network: nn.Module) -> int:
    """Return the number of parameters, those of an auxiliary tower left out."""
    return sum(p.numel() for name, p in network.named_parameters() if not name.startswith(AUXILIARY))


def count_multiply_adds(network: nn.Module, image_shape: Sequence[int]) -> int:
    """Return the multiply-adds of scoring one image: those of all convolutions and matrix products.

    Pooling, normalisation and sums are left out, as in the papers. Nothing is computed: shapes alone run through a
    copy of the network.
    """
    shapes = copy.deepcopy(network).to("meta").eval()
    dtype = next(network.parameters()).dtype
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(torch.empty(1, *image_shape, dtype=dtype, device="meta"))
    return counter.get_total_flops() // 2
