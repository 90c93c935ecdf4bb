"""Reports of steps and solves as records of Python's logging."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mlo.engine import Engine
from mlo.errors import ConfigurationError
from mlo.options import is_count
from mlo.reports import ProblemReport, SolveSummary


class Logger:
    """Writes what each step did, and how each of its solves ended, to Python's `logging`.

    A step gives one record for each problem that was not idle, and one for each response node that its gradients went
    through, named by its path: solves, products and iterations, statuses, the worst relative residual, and the norm of
    the stage's own gradient. The level is INFO, and WARNING where a solve broke down. The figures are in the records
    too, for handlers that keep them: `record.step` (the engine's count) and `record.report` (the `mlo.ProblemReport`),
    or `record.path` and `record.summary` (the `mlo.SolveSummary`) of a solve.

    Levels and handlers are the application's, by `logging.basicConfig` for instance. Without any, Python shows warnings
    only.

    Args:
        logger: a logger, or the name of one.
        every: write every so many steps, at least 1. Solves that broke down are written at every step.

    Raises:
        ConfigurationError: an argument is of a wrong kind or out of range.

    Cost: a few strings at each step that is written, and nothing where the level is off.

    >>> import logging, mlo, mlo.callbacks, sys, torch
    >>> class Stage(mlo.Problem):
    ...     def training_step(self, batch):               # w*(x) = x / 2
    ...         w, x = self.params["w"], self.deps.upper.params["x"]
    ...         return (w**2 - w * x).sum()
    >>> class Upper(mlo.Problem):
    ...     def training_step(self, batch):
    ...         return self.deps.stage.params["w"].sum()
    >>> low, top = (torch.nn.ParameterDict({name: torch.ones(1)}) for name in "wx")
    >>> sgd = [torch.optim.SGD(p.parameters(), lr=0.5) for p in (low, top)]
    >>> stage = Stage("stage", low, optimizer=sgd[0], depends_on=["upper"])
    >>> engine = mlo.Engine([stage, Upper("upper", top, optimizer=sgd[1], depends_on=["stage"])])
    >>> log = logging.Logger("example")
    >>> log.addHandler(logging.StreamHandler(sys.stdout))
    >>> reports = engine.run(1, callbacks=[mlo.callbacks.Logger(log)])
    step 1, stage: stepped, steps 1, loss 0, gradient norm 1
    step 1, upper: stepped, steps 1, loss 0.5, gradient norm 0.5
    step 1, upper/stage: 1 CONVERGED, products 1, iterations 1, residual 0, gradient norm 0

    """

    def __init__(self, logger: str | logging.Logger = "mlo", *, every: int = 1) -> None:
        """Check the arguments."""
        if not (isinstance(logger, logging.Logger) or (isinstance(logger, str) and logger)):
            raise ConfigurationError(f"Logger(logger={logger!r}): expected a logging.Logger, or the name of one.")
        if not is_count(every):
            raise ConfigurationError(f"Logger(every={every!r}): expected an integer of at least 1.")
        self._logger = logging.getLogger(logger) if isinstance(logger, str) else logger
        self._every = every

    def __call__(self, engine: Engine, reports: Mapping[str, ProblemReport]) -> None:
        """Write the reports of a step."""
        step = engine.step_count
        due = step % self._every == 0
        for name, report in reports.items():
            if due and report.outcome != "idle" and self._logger.isEnabledFor(logging.INFO):
                extra = {"step": step, "report": report}
                self._logger.info("step %d, %s: %s", step, name, _of_problem(report), extra=extra)
            for path, summary in report.solves.items():
                level = logging.INFO if summary.ok else logging.WARNING
                if (due or not summary.ok) and self._logger.isEnabledFor(level):
                    extra = {"step": step, "path": path, "summary": summary}
                    self._logger.log(level, "step %d, %s: %s", step, path, _of_solves(summary), extra=extra)


def _of_problem(report: ProblemReport) -> str:
    """Return what a problem did in one line."""
    figures = {"loss": report.loss, "gradient norm": report.gradient_norm, **report.metrics}
    figures |= {f"validation {name}": value for name, value in (report.validation or {}).items()}
    return ", ".join([report.outcome, f"steps {report.steps}", *_numbers(figures)])


def _of_solves(summary: SolveSummary) -> str:
    """Return how the solves at one node ended in one line, with the remedy where one broke down."""
    ends = [f"{count} {status.name}" for status, count in summary.statuses.items()]
    counts = [f"products {summary.products}", f"iterations {summary.iterations}"]
    figures = {"residual": summary.worst_residual, "gradient norm": summary.gradient_norm}
    remedies = " ".join(status.remedy for status in summary.statuses if not status.ok)
    return ", ".join([*ends, *counts, *_numbers(figures)]) + (f". {remedies}" if remedies else "")


def _numbers(figures: Mapping[str, float | None]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in figures.items() if value is not None]
