"""An optimizer's step, without the range for torch's profiler where no profiler runs."""

from __future__ import annotations

from typing import Any

import torch.optim.optimizer as optimizers
from torch.autograd import profiler
from torch.optim import Optimizer

# What torch puts around the step of every optimizer's class: a range of the profiler, and the hooks of steps. The range
# takes as long as the arithmetic of SGD on a small network.
_WRAPPER = Optimizer.profile_hook_step(lambda _: None).__code__


def take(optimizer: Optimizer) -> None:
    """Do what `optimizer.step()` does, past the range for the profiler where nothing is there to see it.

    Cost: that of the step, less six to nine microseconds, and twice that where the caches are cold.
    """
    step: Any = type(optimizer).step
    # By its code, since a decorator around it has the attributes of the wrapper too.
    if getattr(step, "__code__", None) is _WRAPPER and not _watched(optimizer):
        step.__wrapped__(optimizer)
    else:
        optimizer.step()


def _watched(optimizer: Optimizer) -> bool:
    """Whether there is a profiler, a hook, or a step of this optimizer's own (schedulers count by one)."""
    return bool(
        "step" in optimizer.__dict__
        or getattr(profiler, "_is_profiler_enabled", True)
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or optimizers._global_optimizer_pre_hooks
        or optimizers._global_optimizer_post_hooks
    )
