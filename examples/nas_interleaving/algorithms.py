"""The engine of each algorithm that searches an architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlo
from examples.nas_interleaving.interleaving import chain, handed_on
from examples.nas_interleaving.joint import joint
from examples.nas_interleaving.options import SettingsError
from examples.nas_interleaving.parts import Parts
from examples.nas_interleaving.search_settings import (
    DARTS_FIRST_ORDER,
    JOINT,
    NO_TRANSFER,
    RANDOM,
    WARM_START,
    SearchSettings,
)
from examples.nas_interleaving.spaces import SearchSpace, search_space
from examples.nas_interleaving.tasks import Task, check_compatible


def whole_space(settings: SearchSettings) -> SearchSpace:
    """Return the search space that the settings name."""
    return search_space(settings.space, settings.nodes, settings.partial_channels or None)


def counted_in_steps(tasks: Sequence[Task], settings: SearchSettings) -> SearchSettings:
    """Return the settings with epochs counted in steps; an epoch is a pass over the shortest training set."""
    if not settings.epochs:
        return settings
    batches = min(len(task.train) for task in tasks) // settings.batch_size  # type: ignore[arg-type]
    steps = max(1, batches // settings.stage_steps)
    return replace(
        settings, steps=settings.epochs * steps, warmup=settings.warmup_epochs * steps, epochs=0, warmup_epochs=0
    )


def build_engine(tasks: Sequence[Task], settings: SearchSettings, space: SearchSpace | None = None) -> mlo.Engine:
    """Return the engine of a search.

    Args:
        tasks: the learners' tasks.
        settings: which algorithm, and everything else.
        space: in place of the whole search space.

    Raises:
        TaskError: there are no tasks, they do not go together, or one is smaller than a batch.
        SettingsError: a method, or the stage that it is for, is unknown; or nothing is searched at all.

    """
    check_compatible(tasks)
    settings = counted_in_steps(tasks, settings)
    if settings.algorithm == RANDOM:
        raise SettingsError("algorithm = 'random': there is nothing to train in this search; expected another one.")
    if settings.algorithm == DARTS_FIRST_ORDER:
        settings = replace(settings, method=("stop-gradient",))
    parts = Parts(tasks, settings, space or whole_space(settings))
    if settings.algorithm == JOINT:
        return joint(parts)
    if settings.algorithm == WARM_START:
        return handed_on(parts)
    return chain(parts, transfer=settings.algorithm != NO_TRANSFER)
