"""`Engine`: the one loop that trains the problems of a graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlo.ambient import Differentiating
from mlo.compiled_sweep import compiled_sweeps
from mlo.errors import BreakdownError, ConfigurationError, GraphError, MloWarning, UnusedDependencyWarning
from mlo.evaluation import Evaluation
from mlo.graph import ProblemGraph
from mlo.links import Links
from mlo.member import Member, MicroBatch, cuda_devices
from mlo.memory import separate_gradients
from mlo.optimizer_facts import warn_of_unknown_decay
from mlo.options import is_count
from mlo.outcome import number
from mlo.problem import FIXED_OPTIONS, Problem
from mlo.random_state import Preserved
from mlo.recording import Recording
from mlo.reports import ProblemReport, summarised
from mlo.solve_batches import Previews, SolveBatches, with_present_state
from mlo.solve_start import begin_recording, check_recording, check_start, start_over
from mlo.stage_function import leaves
from mlo.status import SolveReport
from mlo.total_gradient import TotalGradient, accumulate_total_gradient
from mlo.training_modes import TrainingModesKept
from mlo.update import step_scheduler, take_step
from mlo.vectors import Vector

Reports = dict[str, ProblemReport]
Callback = Callable[["Engine", Reports], object]


class Engine:
    """Trains problems that depend on each other, and gives the hypergradient of any of them.

    Args:
        problems: in solve order, lowest level first. Order and `depends_on` are all that is needed: see
            `ProblemGraph` for what follows from them.

    A step of the engine takes `steps` optimizer steps of every root (a problem that no other reads as a
    response). A problem is stale at the start of the step, and again whenever a later problem that its
    solution depends on has stepped. Before a problem takes an optimizer step, all responses that it reads,
    directly or through others, are made fresh, highest first: each takes its own `steps`, starting from where
    it is, and makes its own dependencies fresh before each of them.

    Raises:
        ConfigurationError, GraphError: the problems do not fit together.

    Attributes:
        graph: the `ProblemGraph`; `print(engine.graph)` shows how the problems were read.
        problems: the problems by name.
        step_count: how many steps the engine has made.

    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        """Check everything and build the graph."""
        given = _checked_problems(problems)
        self.graph = ProblemGraph(given)
        self.problems: Mapping[str, Problem] = {p.name: p for p in given}
        self.step_count = 0
        self._definitions = {(p.name, option): getattr(p, option) for p in given for option in FIXED_OPTIONS}
        self._members = {p.name: Member(p) for p in given}
        for name, member in self._members.items():
            member.see({q: self._members[q] for q in (name, *self.graph.direct(name))})
        self._links = {name: Links(self.graph, self._members, name) for name in self.graph.names}
        self._sweeps = compiled_sweeps(self._links, self._members)
        self._warm_starts: dict[str, Vector] = {}
        self._notes: dict[str, dict[str, Any]] = {}
        self._solves: dict[str, list[SolveReport]] = {}
        self._stopping = False
        self._check_parameters()
        self._introduce()
        for p in given:
            warn_of_unknown_decay(p.name, p.optimizer)
            self._warn_of_misplaced_method(p)
            check_recording(self.graph, self._members[p.name])
            check_start(self._members[p.name], self._members)

    # --- the loop ----------------------------------------------------------------------------------------------

    def step(self) -> Reports:
        """Make one step of every root, and return what each problem did.

        Raises:
            LossError: a loss is not a finite scalar with a graph.
            EvaluationError: a loss reaches parameters past the engine, or writes to them.
            BreakdownError: a solve broke down and its method says `"raise"`.

        Exceptions of user code keep their type. After one in a loss or in a method the problem in question is as it
        was before its optimizer step, and the engine can go on; one that a scheduler raises comes after the step.

        """
        self._refresh_members()
        if self.step_count == 0:
            self._warn_of_no_optimizer()
        self._notes, self._solves = {}, {}
        for name, member in self._members.items():
            member.fresh = False
            self._notes[name], self._solves[name] = {}, []
        with Differentiating():
            for root in self.graph.roots:
                self._solve(self._members[root])
        self.step_count += 1
        return {n: ProblemReport(n, **notes, solves=summarised(self._solves[n])) for n, notes in self._notes.items()}

    def _solve(self, root: Member) -> None:
        """Let a root take its steps, and before them whatever must be fresh.

        The pending problems are kept on a list: a chain may be longer than Python's recursion limit.
        """
        pending = [self._take_steps(root)]
        while pending:
            stale = next(pending[-1], None)
            if stale is None:
                pending.pop()
            else:
                pending.append(self._take_steps(stale))

    def _take_steps(self, member: Member) -> Iterator[Member]:
        """Let a problem take its steps, or none where it takes none; yield what must be solved before each."""
        links, problem, outcome = self._links[member.name], member.problem, None
        if problem.optimizer is None or self.step_count < problem.warmup:
            outcome = "no optimizer" if problem.optimizer is None else "warm-up"
        steps = problem.steps if outcome is None else 0
        for step in range(steps or 1):
            for response in links.responses:  # highest first, each once those above it are solved
                if not response.fresh:
                    yield response
            if outcome is not None:
                self._draw_batches(member)
                self._notes[member.name]["outcome"] = outcome
                break
            if step == 0 and problem.start_from is not None:  # what it starts from may be one of them
                start_over(member, self._members)
            if links.records:
                begin_recording(links, self._members, member, steps - step)
            self._update(member, links, last=step == steps - 1)
        member.fresh = True

    def _update(self, member: Member, links: Links, *, last: bool) -> None:
        """Take one optimizer step, the last one of a solve or another."""
        name, problem, recording = member.name, member.problem, member.recording
        batches = member.feed.next_batches(problem.accumulate)
        repeatable = last or recording is not None
        evaluation = self._evaluation(SolveBatches(), self._warm_starts, self._solves[name])
        gradient = partial(
            accumulate_total_gradient, evaluation, member, member.trainable, batches, None, repeatable=repeatable
        )
        before_step = None if recording is None else partial(self._record, member, recording)
        try:
            total, size = take_step(member, gradient, before_step)
        except BreakdownError as error:
            if not error.skip:
                raise
            self._note_batches(member, batches)
            self._notes[name]["outcome"] = "skipped"
            return
        if recording is not None:
            recording.close(member.trainable)
        if repeatable:
            member.micro_batches = total.micro_batches
        for lower in links.lower:
            lower.fresh = False
        notes = {"loss": total.loss, "metrics": total.metrics, "gradient_norm": size}
        self._notes[name] = {"outcome": "stepped", "steps": self._notes[name].get("steps", 0) + 1, **notes}
        if problem.scheduler is not None:
            step_scheduler(problem.scheduler)
        if not member.has_stepped:
            member.has_stepped = True
            self._warn_of_unused(member, total.used.union(total.reached))
            carrying = {m.name for m in links.proxied}
            self._warn_of_cut(member, (total.used & carrying).difference(total.reached))

    @staticmethod
    def _record(member: Member, recording: Recording[list[MicroBatch]], total: TotalGradient) -> None:
        """Record the step that a stage is about to take, if there are more to record."""
        optimizer = member.problem.optimizer
        if optimizer is not None and len(recording.steps) < recording.length:
            recording.add(optimizer, member.trainable, total.micro_batches, member.problem.grad_clip)

    def _draw_batches(self, member: Member) -> None:
        """Give a problem that does not step the batches that its response is differentiated on."""
        if self._links[member.name].is_read:
            self._note_batches(member, member.feed.next_batches(member.problem.accumulate))

    def _note_batches(self, member: Member, batches: Sequence[object]) -> None:
        member.micro_batches = with_present_state(member, batches)

    def run(self, steps: int, *, validate_every: int | None = None, callbacks: Sequence[Callback] = ()) -> Reports:
        """Make `steps` steps and return the reports of the last one.

        Args:
            steps: number of engine steps, at least 1.
            validate_every: call `validate` after every so many steps of the engine, those of runs before included; its
                metrics stand in the reports.
            callbacks: each is called as `callback(engine, reports)` after every step (and its validation). One that
                calls `engine.stop()` ends the run after this step.

        Raises:
            ConfigurationError: an argument is out of range.

        """
        if not is_count(steps):
            raise ConfigurationError(f"Engine.run(steps={steps!r}): expected an integer of at least 1.")
        if validate_every is not None and not is_count(validate_every):
            raise ConfigurationError(
                f"Engine.run(validate_every={validate_every!r}): expected an integer of at least 1, or None."
            )
        if callable(callbacks) or not all(map(callable, callbacks)):
            raise ConfigurationError(
                f"Engine.run(callbacks={callbacks!r}): expected a sequence of functions of (engine, reports), e.g. "
                "callbacks=[log]."
            )
        self._warn_of_missing_validation(validate_every)
        self._stopping = False
        reports: Reports = {}
        for _ in range(steps):
            reports = self.step()
            if validate_every is not None and self.step_count % validate_every == 0:
                metrics = self.validate()
                reports = {name: replace(r, validation=metrics.get(name)) for name, r in reports.items()}
            for callback in callbacks:
                callback(self, reports)
            if self._stopping:
                break
        return reports

    def stop(self) -> None:
        """End `run` after the present step."""
        self._stopping = True

    def validate(self) -> dict[str, dict[str, float]]:
        """Call `validation_step` of every problem that has one, and return their metrics.

        All modules are in evaluation mode meanwhile, gradients are off, and training modes are restored after. A
        `ReduceLROnPlateau` scheduler is stepped with the metric, or the entry `"loss"` of several.
        """
        found: dict[str, dict[str, float]] = {}
        self._introduce()
        with self._training_modes_kept(), torch.no_grad():
            for problem in self.problems.values():
                problem.module.eval()
            for name, problem in self.problems.items():
                result = problem.validation_step()
                if result is None:
                    continue
                named = result if isinstance(result, Mapping) else {"loss": result}
                what = f"problem {name!r}: validation_step"
                found[name] = {key: number(value, f"{what}, {key!r}") for key, value in named.items()}
        for name, metrics in found.items():
            scheduler = self.problems[name].scheduler
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                if "loss" not in metrics:
                    raise ConfigurationError(
                        f"problem {name!r}: validation_step returned {', '.join(map(repr, metrics))}; expected the key "
                        "'loss' for the ReduceLROnPlateau scheduler."
                    )
                scheduler.step(metrics["loss"])
        return found

    def _training_modes_kept(self) -> TrainingModesKept:
        return TrainingModesKept([p.module for p in self.problems.values()])

    # --- the hypergradient -------------------------------------------------------------------------------------

    def hypergradient(self, name: str) -> dict[str, Tensor]:
        """Return the total gradient of a problem's loss in its parameters, at the present values of all problems.

        With θ*(x) the responses that the problem reads, it is ∂L/∂x + (dθ*/dx)ᵀ ∂L/∂θ, the second part by the
        methods of the stages. Nothing is trained and nothing changes: no parameter, buffer, `.grad`, optimizer,
        training mode, random state or data position. Each problem's last batch is used, with the random draws of its
        last evaluation; before the first step, the batch that a fresh run through the data begins with.

        Args:
            name: the problem's name.

        Returns:
            For each trainable parameter by name a tensor of its shape (zeros where the loss does not reach it).

        Raises:
            ConfigurationError: there is no such problem.
            LossError, EvaluationError, BreakdownError: as in `step`.

        Cost: one evaluation of the problem's loss with its backward pass, and the pullback of each stage
        that it reads.

        """
        if name not in self._members:
            raise ConfigurationError(
                f"Engine.hypergradient({name!r}): expected the name of a problem, one of {', '.join(self.graph.names)}."
            )
        self._refresh_members()
        member, involved = self._members[name], self._links[name].involved
        may_draw = any(m.host_draws.possible for m in involved)
        own = leaves(member.trainable)
        with Preserved(cuda_devices(involved), whole=may_draw) as state, self._training_modes_kept(), Differentiating():
            previews = Previews(member, state)
            evaluation = self._evaluation(previews, dict(self._warm_starts), None)
            used = previews(member)
            for m in involved:  # all are drawn before any loss is evaluated
                previews(m)
            accumulate_total_gradient(evaluation, member, own, [b for b, _ in used], [s for _, s in used])
        separate_gradients(own)
        return {
            n: torch.zeros_like(p) if t.grad is None else t.grad
            for n, p, t in zip(member.names.trainable, member.trainable, own, strict=True)
        }

    def _evaluation(
        self,
        batches: Callable[[Member], list[MicroBatch]],
        warm_starts: MutableMapping[str, Vector],
        reports: list[SolveReport] | None,
    ) -> Evaluation:
        return Evaluation(self.graph, self._links, self._members, batches, warm_starts, reports, self._sweeps)

    # --- checks ------------------------------------------------------------------------------------------------

    def _introduce(self) -> None:
        """Let the problems find each other here: they may have been in another engine since."""
        for p in self.problems.values():
            p._introduce(self.problems)

    def _check_definitions(self) -> None:
        """Raise an error for a definition that has changed since it was checked and built upon."""
        for (name, option), value in self._definitions.items():
            if getattr(self.problems[name], option) is not value:
                raise ConfigurationError(
                    f"problem {name!r}, {option}: expected what it was when the engine was built; it has been set "
                    "since. Build a new engine from the problems."
                )
        for member in self._members.values():
            member.options_seen = member.problem._options_set

    def _refresh_members(self) -> None:
        """Follow what the user has frozen, unfrozen or replaced since the last step."""
        for member in self._members.values():
            problem = member.problem
            if problem._known is not self.problems:
                problem._introduce(self.problems)
            if problem._options_set != member.options_seen:
                self._check_definitions()
        changed = False
        for member in self._members.values():
            changed = member.refresh() or changed
        if changed:
            for member in self._members.values():
                member.see(member.seen)
            self._check_parameters()

    def _check_parameters(self) -> None:
        owners: dict[int, tuple[str, str]] = {}
        for member in self._members.values():
            if not member.trainable:
                raise ConfigurationError(
                    f"problem {member.name!r}: expected at least one parameter with requires_grad that its optimizer "
                    "holds; all are frozen or foreign to the optimizer. Unfreeze one, or remove the problem from the "
                    "engine."
                )
            for n, p in member.parameters.items():
                other, other_name = owners.setdefault(id(p), (member.name, n))
                if other != member.name and p.requires_grad:
                    raise GraphError(
                        f"problems {other!r} and {member.name!r} both hold the parameter {n!r} ({other_name!r} in "
                        f"{other!r}); expected each trainable parameter in one problem. Let one of them read it by "
                        "depends_on."
                    )

    def _warn_of_misplaced_method(self, problem: Problem) -> None:
        """Warn of a method that stands at the problem above instead of at the stages that it differentiates."""
        stages = [d for d in self.graph.internal(problem.name) if self.problems[d].hypergradient is None]
        if problem.hypergradient is None or self.graph.readers(problem.name) or not stages:
            return
        default = type(self.graph.method(stages[0])).__name__
        warnings.warn(
            f"problem {problem.name!r}, hypergradient={type(problem.hypergradient).__name__}: not used, since no "
            "gradient flows through the response of this problem. A method belongs to the stage whose solution is "
            f"differentiated: here to {', '.join(map(repr, stages))}, for want of one by {default}.",
            MloWarning,
            stacklevel=3,
        )

    def _warn_of_missing_validation(self, validate_every: int | None) -> None:
        """Warn of schedulers that are stepped at validation if there is none."""
        for name, p in self.problems.items():
            if validate_every is None and isinstance(p.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                warnings.warn(
                    f"problem {name!r}: its ReduceLROnPlateau scheduler is stepped at validation, and this run has "
                    "none. Give run(validate_every=...), or call engine.validate() in a callback.",
                    MloWarning,
                    stacklevel=3,
                )

    def _led(self, member: Member) -> set[str]:
        """Return what a problem may depend on without reading it: those that its responses depend on."""
        return {q for d in self.graph.responses(member.name) for q in self.graph.inputs(d)}

    def _warn_of_unused(self, member: Member, used: set[str]) -> None:
        start = member.problem.start_from
        known = self._led(member) | ({member.problem.depends_on[start]} if start else set())
        for d in self.graph.direct(member.name):
            if d not in used and d not in known:
                warnings.warn(
                    f"problem {member.name!r} declares that it depends on {d!r}, but its loss did not read it by "
                    "self.deps in its first step. Use self.deps in training_step, or remove the name from depends_on "
                    "if the loss uses it in no other way (if it is read in some steps only, nothing is wrong).",
                    UnusedDependencyWarning,
                    stacklevel=4,
                )

    def _warn_of_cut(self, member: Member, cut: set[str]) -> None:
        for d in sorted(cut - self._led(member)):
            warnings.warn(
                f"problem {member.name!r} reads the response of {d!r}, but its loss had no gradient in it in its first "
                f"step: nothing flows through the solution of {d!r}. Do not detach it and do not take .item() or "
                f".data; if that is meant, use hypergradient=mlo.StopGradient() at {d!r}.",
                UnusedDependencyWarning,
                stacklevel=4,
            )

    def _warn_of_no_optimizer(self) -> None:
        if all(p.optimizer is None for p in self.problems.values()):
            warnings.warn(
                "none of the problems has an optimizer: a step changes nothing. Give optimizer= to those that are to "
                "be trained, or use engine.hypergradient(name) for gradients alone.",
                MloWarning,
                stacklevel=3,
            )


def _checked_problems(problems: Iterable[Problem]) -> list[Problem]:
    if isinstance(problems, Problem) or not isinstance(problems, Iterable):
        raise ConfigurationError(
            f"Engine(problems={problems!r}): expected a sequence of problems in solve order, lowest level first."
        )
    given = list(problems)
    if not given:
        raise ConfigurationError("Engine(problems=[]): expected at least one problem.")
    for p in given:
        if not isinstance(p, Problem):
            raise ConfigurationError(f"Engine(problems=…): expected instances of mlo.Problem; got {p!r}.")
        if not hasattr(p, "warmup"):
            raise ConfigurationError(
                f"{type(p).__name__} does not call super().__init__(...) of mlo.Problem in its constructor."
            )
    return given
