"""Joint training as problems: one network for all tasks, under one architecture.

W*(A) = argmin  Σ_k w_k L(A, W, H_k; D_k^train),        min over A of  Σ_k w_k L(A, W*(A), H_k*(A); D_k^val)
"""

from __future__ import annotations

import mlo
from examples.nas_interleaving.methods import stage_methods
from examples.nas_interleaving.parts import Parts
from examples.nas_interleaving.stages import ARCHITECTURE, JointArchitecture, JointStage

JOINT_STAGE = "joint"


def joint(parts: Parts) -> mlo.Engine:
    """Return the engine of a joint search: one lower stage, whose step takes a batch of every task."""
    names = [task.name for task in parts.tasks]
    weights = parts.settings.task_weights or (1 / len(names),) * len(names)
    network = parts.shared()
    stage = JointStage(
        JOINT_STAGE,
        network,
        names=names,
        weights=weights,
        validation=parts.validation(parts.tasks),
        data=parts.batches_of_all("train"),
        depends_on=[ARCHITECTURE],
        hypergradient=stage_methods(parts.settings.method, [JOINT_STAGE])[JOINT_STAGE],
        **parts.training(network),
    )
    upper = JointArchitecture(
        ARCHITECTURE,
        parts.architecture,
        names=names,
        weights=weights,
        depends_on=[JOINT_STAGE],
        **parts.choice(),
    )
    return mlo.Engine([stage, upper])
