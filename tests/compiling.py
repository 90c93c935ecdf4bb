"""What tests of `compile=` have in common."""

import pytest
import torch

#: The backend that captures the passes and runs them eagerly: it compiles in no time.
CAPTURED = {"backend": "aot_eager"}

#: The marks of a module of such tests.
MARKS = [
    pytest.mark.skipif(
        not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch compiles no reverse pass"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("fresh_graphs"),
]


class Doubled(torch.autograd.Function):
    """Of which torch compiles a first derivative alone."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient
