"""What a table compares: rows that differ in algorithm or settings, and the searches that each of them takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from examples.nas_interleaving.options import SettingsError
from examples.nas_interleaving.outlier import SHUFFLED
from examples.nas_interleaving.search_settings import (
    ALGORITHMS,
    INTERLEAVING,
    ON_ONE_TASK,
    ONE_ROUND,
    SearchSettings,
    refuse_unread,
)
from examples.nas_interleaving.table_settings import EQUAL_BUDGET, AblateSettings, CompareSettings


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        label: in the table.
        algorithm: by which it searches.
        changes: settings in which it differs from the others.

    """

    label: str
    algorithm: str
    changes: dict[str, Any]

    def searches(self, base: SearchSettings, budget: str, seed: int) -> list[SearchSettings]:
        """Return the settings of its searches: one for each task where the algorithm takes one task.

        Args:
            base: settings that the variant changes. They count in steps.
            budget: "equal" or "steps", see `CompareSettings`.
            seed: of all of them.

        """
        changes = dict(self.changes)
        if self.algorithm in ONE_ROUND:
            changes.setdefault("rounds", 1)
        tasks = changes.pop("tasks", base.tasks)
        lists = [(task,) for task in tasks] if self.algorithm in ON_ONE_TASK else [tasks]
        searches = [replace(base, algorithm=self.algorithm, seed=seed, tasks=names, **changes) for names in lists]
        if budget != EQUAL_BUDGET:
            return searches
        share = batches_of(base) / len(searches)
        return [at_budget(settings, share) for settings in searches]


def batches_of(settings: SearchSettings) -> int:
    """Return the training budget of a search: the batches on which its stages train, K·M·stage_steps per step."""
    return len(settings.tasks) * settings.rounds * settings.stage_steps * settings.steps


def at_budget(settings: SearchSettings, batches: float) -> SearchSettings:
    """Return the settings with as many steps as the budget allows, and the same share of them for the warm-up."""
    per_step = batches_of(settings) / settings.steps
    steps = max(1, round(batches / per_step))
    warmup = min(steps - 1, round(settings.warmup * steps / settings.steps))
    return replace(settings, steps=steps, warmup=warmup)


def compared(settings: CompareSettings) -> list[Variant]:
    """Return the rows of a comparison.

    Raises:
        SettingsError: one cannot be understood, or two are alike.

    """
    variants = [_parsed(text) for text in settings.algorithms]
    _check_different([variant.label for variant in variants])
    return variants


def ablated(settings: AblateSettings, base: SearchSettings) -> list[Variant]:
    """Return the rows of ablations of interleaving: the settings as given, and what is varied, each by itself.

    Raises:
        SettingsError: what is to be varied is unknown.

    """
    rows = {"as given": Variant("as given", INTERLEAVING, {})}
    for text in settings.vary:
        name, _, values = text.partition("=")
        for label, changes in _varied(name, [v for v in values.split(",") if v], settings, base):
            if any(getattr(base, key) != value for key, value in changes.items()):
                rows.setdefault(label, Variant(label, INTERLEAVING, changes))
    return list(rows.values())


def _varied(
    name: str, values: Sequence[str], settings: AblateSettings, base: SearchSettings
) -> list[tuple[str, dict[str, Any]]]:
    tasks = base.tasks
    if name in ("rounds", "proximity"):
        if not values:
            raise SettingsError(f"vary = {name!r}: expected values, e.g. {name}=1,2.")
        return [(f"{name}={v}", {name: _value(f"{name}={v}", name, v)}) for v in values]
    if name == "learners":
        numbers = [_value(f"learners={v}", "rounds", v) for v in values] or range(1, len(tasks))
        if max(numbers, default=0) > len(tasks):
            raise SettingsError(f"vary = 'learners={','.join(values)}': expected at most the {len(tasks)} tasks given.")
        return [(f"learners={k}", {"tasks": tasks[:k]}) for k in numbers]
    if name == "order" and not values:
        orders = [tasks[::-1], *(tasks[i:] + tasks[:i] for i in range(1, len(tasks)))]
        return [(f"order={'-'.join(str(1 + tasks.index(t)) for t in o)}", {"tasks": o}) for o in orders]
    if name == "outlier" and not values:
        outlier = settings.outlier or SHUFFLED + tasks[0]
        return [(f"with {outlier}", {"tasks": (*tasks, outlier)})]
    raise SettingsError(
        f"vary = {name!r}: expected rounds=VALUES, proximity=VALUES, learners, learners=VALUES, order or outlier."
    )


def _parsed(text: str) -> Variant:
    algorithm, _, rest = text.partition(":")
    if algorithm not in ALGORITHMS:
        raise SettingsError(f"algorithms: unknown {algorithm!r}; expected one of {', '.join(ALGORITHMS)}.")
    names = "|".join(f.name for f in fields(SearchSettings))
    changes = {}
    for part in re.split(rf",(?=(?:{names})=)", rest) if rest else ():
        name, sign, value = part.partition("=")
        if not sign or name in ("algorithm", "seed", "tasks"):
            raise SettingsError(f"algorithms: {text!r}: expected setting=value, got {part!r}.")
        changes[name] = _value(text, name, value)
    refuse_unread(algorithm, changes)
    return Variant(text, algorithm, changes)


def _value(text: str, name: str, value: str) -> Any:
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(SearchSettings)}
    if name not in kinds:
        raise SettingsError(f"{text!r}: unknown setting {name!r}.")
    if kinds[name] is tuple:
        return (value,)
    try:
        return kinds[name](value)
    except ValueError:
        raise SettingsError(f"{text!r}: expected {kinds[name].__name__} for {name}, got {value!r}.") from None


def _check_different(labels: Sequence[str]) -> None:
    for label in labels:
        if labels.count(label) > 1:
            raise SettingsError(f"algorithms: {label!r} is given twice; expected different ones.")
