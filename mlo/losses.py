"""What a loss must be: a finite scalar with a graph."""

from __future__ import annotations

import math

from torch import Tensor

from mlo.errors import LossError


def checked_loss(loss: object, title: str) -> Tensor:
    """Return a loss that is a finite scalar, or raise the error that says what it is instead."""
    if isinstance(loss, Tensor) and loss.dim() == 0:
        value = loss.item()
        if isinstance(value, float) and math.isfinite(value):
            return loss
    if not isinstance(loss, Tensor):
        raise LossError(f"{title} returned {type(loss).__name__}; expected a scalar tensor.")
    if loss.numel() != 1:
        raise LossError(
            f"{title} returned a tensor of shape {tuple(loss.shape)}; expected a scalar. Reduce it, for example by "
            ".mean()."
        )
    if not loss.is_floating_point():
        raise LossError(f"{title} returned a tensor of {loss.dtype}; expected a real floating-point scalar.")
    value = loss.item()
    if not math.isfinite(value):
        raise LossError(
            f"{title} returned {value}; expected a finite number. Look at the data and the parameters of this step "
            "(which are unchanged); lower the learning rate or clip gradients (grad_clip=)."
        )
    return loss if loss.dim() == 0 else loss.reshape(())


def without_graph(title: str, hint: str = "") -> LossError:
    """Return the error for a loss that nothing can be learnt from."""
    return LossError(
        f"{title} returned a tensor without a graph; expected a loss computed from the parameters. Do not detach it, "
        f"and do not compute it under torch.no_grad().{hint}"
    )


def unreached(title: str, hint: str = "") -> LossError:
    """Return the error for a loss that does not depend on what it is minimised over."""
    return LossError(
        f"{title} does not depend on any of the parameters that it is minimised over; expected a loss computed from "
        "them. Use self(...) or self.params (in best_response the first argument), and do not detach them."
        f"{hint}"
    )
