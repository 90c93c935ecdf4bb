"""The settings of tables: which searches are compared."""

from __future__ import annotations

from dataclasses import dataclass

from examples.nas_interleaving.options import Settings, SettingsError, choice, counts, text, texts

EQUAL_BUDGET = "equal"
EQUAL_STEPS = "steps"
BUDGETS = (EQUAL_BUDGET, EQUAL_STEPS)

_BUDGET_HELP = (
    "equal: every search trains on as many batches as one with the settings given, its steps follow; steps: every "
    "search makes the steps given, whatever that costs"
)


@dataclass(frozen=True)
class TableSettings(Settings):
    """What tables have in common."""

    seeds: tuple[int, ...] = counts((0, 1, 2), "one column of cells for each", "0 1 2", least=0)

    def __post_init__(self) -> None:
        """Check every field, and that the seeds differ."""
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SettingsError(f"seeds = {self.seeds}: expected different ones, at least one.")


@dataclass(frozen=True)
class CompareSettings(TableSettings):
    """Settings of the comparison."""

    algorithms: tuple[str, ...] = texts(
        ("interleaving", "no-transfer", "warm-start", "joint", "darts", "darts-first-order", "random"),
        "rows of the table, each an algorithm, with settings of its own after a colon, e.g. "
        "interleaving:rounds=1,proximity=0.1; darts and darts-first-order search on each task in turn",
        "joint",
    )
    budget: str = choice(EQUAL_BUDGET, _BUDGET_HELP, BUDGETS)


@dataclass(frozen=True)
class AblateSettings(TableSettings):
    """Settings of the ablations."""

    vary: tuple[str, ...] = texts(
        ("rounds=1,2,3", "proximity=0,0.1,1,10", "learners", "order", "outlier"),
        "what is varied, each by itself: rounds=VALUES (M), proximity=VALUES (λ), learners[=VALUES] (K: the first of "
        "the tasks), order (reversed, and each task first in turn), outlier (one task more, see --outlier)",
        "rounds=1,2,3",
    )
    outlier: str = text("", "task that is added as an outlier", "the first task with its pixels shuffled", empty=True)
    budget: str = choice(EQUAL_STEPS, _BUDGET_HELP, BUDGETS)
