"""Interleaving learning as problems: K·M chained stages under one architecture (arXiv 2103.07018).

Learner k in round m has encoder weights W and a stem and a head H of its own, and solves

    W*(A), H* = argmin  L(A, W, H; D_k^train) + λ ‖W − W_prev*(A)‖²,

where W_prev is the encoder of the learner before it: k − 1 in the same round, or the last learner of the round
before. The architecture A minimises the sum of the last round's validation losses.
"""

from __future__ import annotations

import copy

import torch

import mlo
from examples.nas_interleaving.methods import stage_methods
from examples.nas_interleaving.parts import Parts
from examples.nas_interleaving.stages import ARCHITECTURE, LearnersArchitecture, LearnerStage


def stage_name(learner: int, round_: int) -> str:
    """Return the name of a stage; learners and rounds count from 1."""
    return f"learner_{learner}_round_{round_}"


def stage_names(learners: int, rounds: int) -> list[str]:
    """Return the stages in the order in which they learn."""
    return [stage_name(k, m) for m in range(1, rounds + 1) for k in range(1, learners + 1)]


def chain(parts: Parts, *, transfer: bool = True) -> mlo.Engine:
    """Return the engine of an interleaving search; K = 1 and M = 1 is plain DARTS.

    All encoders start from the same weights, and so do all stems and heads of one task.

    Args:
        parts: what the problems are made of.
        transfer: whether each learner is drawn towards the encoder of the one before it. Without, the learners are
            DARTS chains that share nothing but the architecture.

    """
    first_round = parts.learners()
    names, methods = _stages(parts)
    problems: list[mlo.Problem] = []
    for position, name in enumerate(names):
        k = position % len(parts.tasks)
        roles = {ARCHITECTURE: ARCHITECTURE}
        if transfer and position > 0:
            roles["previous"] = names[position - 1]
        learner = copy.deepcopy(first_round[k])
        problems.append(
            LearnerStage(
                name,
                learner,
                proximity=parts.settings.proximity,
                validation=parts.validation([parts.tasks[k]]),
                data=parts.batches("train", parts.tasks[k]),
                depends_on=roles,
                hypergradient=methods[name],
                **parts.training(learner),
            )
        )
    return mlo.Engine([*problems, _upper(parts, names, [() for _ in parts.tasks])])


def handed_on(parts: Parts) -> mlo.Engine:
    """Return the engine of a search in which one network is handed from stage to stage, without a pull.

    Each time that a stage is solved, its network starts from what the stage before has just made of it (`start_from`
    of `mlo.Problem`), with the optimizer's state cleared: the encoder, and the stems and heads of all tasks, so that a
    learner finds its own as it left them. The first stage starts from what the last one had in the step before.
    """
    network = parts.shared()
    names, methods = _stages(parts)
    problems: list[mlo.Problem] = []
    for position, name in enumerate(names):
        k = position % len(parts.tasks)
        roles = {ARCHITECTURE: ARCHITECTURE}
        if position > 0:
            roles["previous"] = names[position - 1]
        own = copy.deepcopy(network)
        problems.append(
            LearnerStage(
                name,
                own,
                task=(k,),
                validation=parts.validation([parts.tasks[k]]),
                data=parts.batches("train", parts.tasks[k]),
                depends_on=roles,
                start_from="previous" if position > 0 else None,
                hypergradient=methods[name],
                **parts.training(own),
            )
        )
    upper = _upper(parts, names, [(k,) for k in range(len(parts.tasks))])
    return _Circle([*problems, upper], first=names[0], last=names[-1])


class _Circle(mlo.Engine):
    """An engine after each of whose steps the first stage takes over the network of the last."""

    def __init__(self, problems: list[mlo.Problem], *, first: str, last: str) -> None:
        super().__init__(problems)
        self._first, self._last = first, last

    def step(self) -> dict[str, mlo.ProblemReport]:
        """Make a step, and hand the network back to the first stage."""
        reports = super().step()
        first, last = self.problems[self._first], self.problems[self._last]
        if first is not last and first.optimizer is not None:
            with torch.no_grad():
                for to, from_ in zip(first.module.parameters(), last.module.parameters(), strict=True):
                    to.copy_(from_)
            first.optimizer.state.clear()
        return reports


def _stages(parts: Parts) -> tuple[list[str], dict[str, mlo.HypergradientMethod]]:
    names = stage_names(len(parts.tasks), parts.settings.rounds)
    return names, stage_methods(parts.settings.method, names)


def _upper(parts: Parts, names: list[str], tasks: list[tuple[int, ...]]) -> LearnersArchitecture:
    return LearnersArchitecture(
        ARCHITECTURE, parts.architecture, tasks=tasks, depends_on=names[-len(parts.tasks) :], **parts.choice()
    )
