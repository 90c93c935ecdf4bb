"""Counts the passes that a search makes through its networks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class PassCounter:
    """Counts passes of batches through networks; what is evaluated without gradients does not count.

    Attributes:
        forward: passes forward.
        reverse: passes back from the scores: those for gradients, and those through the graph of a gradient.

    """

    def __init__(self) -> None:
        self.forward = 0
        self.reverse = 0

    def attach(self, networks: Iterable[nn.Module]) -> None:
        """Count the passes of these networks from here on."""
        for network in networks:
            network.register_forward_hook(self._count)

    def _count(self, network: nn.Module, given: Any, scores: Tensor) -> None:
        if torch.is_grad_enabled():
            self.forward += 1
            if scores.requires_grad:
                scores.register_hook(self._count_reverse)

    def _count_reverse(self, gradient: Tensor) -> None:
        self.reverse += 1

    def counts(self) -> dict[str, int]:
        """Return both counts."""
        return {"forward": self.forward, "reverse": self.reverse}
