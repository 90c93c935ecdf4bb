"""A search that can be solved to rounding: a tiny supernet without kinks, on a few images of noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import TensorDataset

import mlo
from examples.nas_interleaving.algorithms import build_engine, whole_space
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.stages import ARCHITECTURE
from examples.nas_interleaving.tasks import Task

_SHARPNESS = 4.0
_VARIANCE = 0.1
_IMAGES, _SIDE, _CLASSES = 12, 5, 2
# No convolution but this one: a few hundred weights in all.
_OPERATIONS = ("none", "max_pool_3x3", "skip_connect", "dil_conv_3x3")


class Smoothed(TorchFunctionMode):
    """Inside of it the networks of the search have no kinks, and batch normalisation does not hide the weights' size.

    ReLU is the softplus of 4x over 4, and max pooling the logarithm of the mean of exponentials: the solution of a
    stage is then a smooth function of the architecture, also where it would lie on a kink (minima often do). Batch
    normalisation adds 0.1 to the variance in the place of 1e-5: a network that did not depend on the length of its
    weights would have no best weights under weight decay.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace three functions, and call all others as they are."""
        options = dict(kwargs or {})
        if func is F.relu:
            return F.softplus(args[0], beta=_SHARPNESS)
        if func is F.max_pool2d:
            return _smooth_max_pool(*args, **options)
        if func is F.batch_norm:
            options["eps"] = _VARIANCE
            args = args[:7]
        return func(*args, **options)


def _smooth_max_pool(x: Tensor, kernel_size: int, stride: int, padding: int, **_: Any) -> Tensor:
    return F.avg_pool2d(x.exp(), kernel_size, stride, padding, count_include_pad=False).log()


def smooth_search(rounds: int, seed: int = 0) -> list[mlo.Problem]:
    """Return the problems of an interleaving search on two tasks, K = 2, with λ = 1, in float64.

    The network has two cells of one node and two channels, with four operations: 300 weights per stage. Every step sees
    all images of a task. To be evaluated inside `Smoothed`.
    """
    settings = SearchSettings(
        tasks=("first", "second"),
        rounds=rounds,
        warmup=0,
        proximity=1.0,
        channels=2,
        cells=2,
        nodes=1,
        batch_size=_IMAGES,
        learning_rate=0.2,
        schedule="constant",
        momentum=0.0,
        weight_decay=0.1,
        grad_clip=0.0,
        seed=seed,
    )
    space = whole_space(settings)
    few = (_OPERATIONS,) * len(space.normal)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        generator = torch.Generator().manual_seed(seed)
        tasks = [_task(name, generator) for name in settings.tasks]
        engine = build_engine(tasks, settings, replace(space, normal=few, reduction=few))
    finally:
        torch.set_default_dtype(before)
    problems = list(engine.problems.values())
    for problem in problems:
        assert problem.data is not None
        problem.data = [next(iter(problem.data))]
    return problems


def _task(name: str, generator: torch.Generator) -> Task:
    """Return images of noise around a pattern per class."""
    patterns = torch.randn(_CLASSES, 1, _SIDE, _SIDE, generator=generator)

    def draw() -> TensorDataset:
        labels = torch.arange(_IMAGES) % _CLASSES
        return TensorDataset(patterns[labels] + torch.randn(_IMAGES, 1, _SIDE, _SIDE, generator=generator), labels)

    return Task(name, _CLASSES, draw(), draw(), draw(), draw())


def stages_of(problems: Sequence[mlo.Problem]) -> list[mlo.Problem]:
    """Return all problems but the architecture."""
    return [problem for problem in problems if problem.name != ARCHITECTURE]
