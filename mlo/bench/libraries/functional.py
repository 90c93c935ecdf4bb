"""The view of a stage over `torch.func.functional_call`, for libraries that hand out tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class FunctionalView:
    """A module with tensors in the place of its parameters.

    Attributes:
        module: it runs this; buffers are its own.
        params: tensors by the names of its parameters.

    """

    module: nn.Module
    params: Mapping[str, Tensor]

    def __call__(self, *args: Any) -> Any:
        """Run the module with `params`."""
        return functional_call(self.module, dict(self.params), args)
