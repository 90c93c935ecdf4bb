"""The baselines of the packaged example: each is what its name says, and costs the passes that it needs."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import mlo
from examples.nas_interleaving.algorithms import build_engine, counted_in_steps
from examples.nas_interleaving.hardware import Precision, find_device
from examples.nas_interleaving.interleaving import stage_names
from examples.nas_interleaving.options import SettingsError
from examples.nas_interleaving.passes import PassCounter
from examples.nas_interleaving.phases import phases
from examples.nas_interleaving.search_settings import SearchSettings, refuse_unread
from examples.nas_interleaving.tasks import load_tasks

TASKS = ("digits:0-1", "digits:2-4")
TINY = SearchSettings(
    tasks=TASKS,
    rounds=1,
    channels=2,
    nodes=1,
    batch_size=8,
    steps=4,
    warmup=0,
    method=("identity:scale=None",),
    momentum=0.0,
    weight_decay=0.0,
)


@pytest.fixture(scope="module")
def tasks():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield load_tasks(TASKS)
    torch.set_default_dtype(before)


def _settings(algorithm, **changes):
    return replace(TINY, algorithm=algorithm, **changes)


def _last_batches(engine, name):
    return engine._members[name].micro_batches[0][0]


def test_the_joint_hypergradient_is_that_of_the_weighted_sum_written_by_hand(tasks):
    weights = (0.3, 0.9)
    engine = build_engine(tasks, _settings("joint", task_weights=weights))
    engine.run(2)
    found = engine.hypergradient("architecture")
    network = engine.problems["joint"].module
    alphas = dict(engine.problems["architecture"].module.named_parameters())
    assert engine.graph.names == ("joint", "architecture")

    def loss(batches):
        return sum(
            w * F.cross_entropy(network.heads[k](network.encoder(*network.stems[k](images), alphas)), labels)
            for k, (w, (images, labels)) in enumerate(zip(weights, batches, strict=True))
        )

    a, w = list(alphas.values()), list(network.parameters())
    upper = loss(_last_batches(engine, "architecture"))
    direct = torch.autograd.grad(upper, a, retain_graph=True)
    c = torch.autograd.grad(upper, w)
    rate = engine.problems["joint"].optimizer.param_groups[0]["lr"]
    gradient = torch.autograd.grad(loss(_last_batches(engine, "joint")), w, create_graph=True)
    through = torch.autograd.grad(gradient, a, [rate * t for t in c])
    for name, d, t in zip(alphas, direct, through, strict=True):
        torch.testing.assert_close(found[name], d - t, rtol=1e-9, atol=1e-13)
        assert t.norm() > 1e-4 * d.norm(), "the indirect part must not vanish beside the direct one"


def test_joint_training_weighs_the_tasks_alike_by_default(tasks):
    report = build_engine(tasks, _settings("joint")).step()["joint"]
    assert report.loss == pytest.approx(sum(report.metrics[task.name] for task in tasks) / 2, rel=1e-12)


def test_without_transfer_the_learners_are_darts_chains_of_their_own(tasks):
    """The architecture's gradient is the sum of those that a search on each task alone would see."""
    together = build_engine(tasks, _settings("no-transfer"))
    assert all(kind != "response" or reader == "architecture" for reader, _, kind in together.graph.edges())
    alone = [build_engine([task], _settings("darts", tasks=(task.name,))) for task in tasks]
    stages = ["learner_1_round_1", "learner_2_round_1"]
    for engine, name in zip(alone, stages, strict=True):
        engine.problems["learner_1_round_1"].module.load_state_dict(together.problems[name].module.state_dict())
        engine.problems["architecture"].module.load_state_dict(together.problems["architecture"].module.state_dict())
    batches = {name: next(iter(together.problems[name].data)) for name in stages}
    upper = next(iter(together.problems["architecture"].data))
    total = None
    for k, (engine, name) in enumerate(zip(alone, stages, strict=True)):
        found = _hypergradient_at(engine, {"learner_1_round_1": batches[name]}, (upper[k],))
        total = found if total is None else {n: total[n] + found[n] for n in found}
    expected = _hypergradient_at(together, batches, upper)
    for n, value in expected.items():
        torch.testing.assert_close(value, total[n], rtol=1e-10, atol=1e-14)


def _hypergradient_at(engine, batches, upper):
    """Return the hypergradient of the same problems with one batch each."""
    for name, problem in engine.problems.items():
        problem.data = [upper] if name == "architecture" else [batches[name]]
    return mlo.Engine(engine.problems.values()).hypergradient("architecture")


def test_first_order_darts_has_no_indirect_gradient(tasks):
    engine = build_engine(tasks[:1], _settings("darts-first-order", tasks=TASKS[:1], method=("neumann",)))
    engine.run(1)
    found = engine.hypergradient("architecture")
    stage, upper = engine.problems["learner_1_round_1"], engine.problems["architecture"]
    ((images, labels),) = _last_batches(engine, "architecture")
    alphas = dict(upper.module.named_parameters())
    loss = F.cross_entropy(stage.module(images, alphas), labels)
    for value, expected in zip(found.values(), torch.autograd.grad(loss, list(alphas.values())), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)


def test_a_warm_start_hands_one_network_from_stage_to_stage(tasks):
    engine = build_engine(tasks, _settings("warm-start", rounds=2, method=("stop-gradient",), momentum=0.9))
    names = stage_names(2, 2)
    hand = {n: p.detach().clone() for n, p in engine.problems[names[0]].module.named_parameters()}
    network = engine.problems[names[0]].module
    for _ in range(2):
        rates = {name: engine.problems[name].optimizer.param_groups[0]["lr"] for name in names}
        alphas = {n: p.detach().clone() for n, p in engine.problems["architecture"].module.named_parameters()}
        engine.step()
        for position, name in enumerate(names):
            images, labels = _last_batches(engine, name)
            leaves = {n: p.clone().requires_grad_() for n, p in hand.items()}
            scores = torch.func.functional_call(network, leaves, (images, alphas, position % 2))
            gradients = torch.autograd.grad(
                F.cross_entropy(scores, labels), list(leaves.values()), materialize_grads=True
            )
            size = torch.sqrt(sum(g.square().sum() for g in gradients))
            clip = min(1.0, TINY.grad_clip / (size.item() + 1e-6))
            hand = {n: p - rates[name] * clip * g for (n, p), g in zip(hand.items(), gradients, strict=True)}
        for name in (names[-1], names[0]):  # the first has taken over what the last has made
            for n, p in engine.problems[name].module.named_parameters():
                torch.testing.assert_close(p.detach(), hand[n], rtol=1e-10, atol=1e-13)


def _counted(tasks, settings, steps=2):
    engine = build_engine(tasks, settings)
    counter = PassCounter()
    counter.attach(p.module for name, p in engine.problems.items() if name != "architecture")
    engine.run(3)  # what is checked once is checked here
    before = counter.counts()
    engine.run(steps)
    return {kind: (count - before[kind]) / steps for kind, count in counter.counts().items()}


@pytest.mark.parametrize(
    ("settings", "stages", "upper", "through"),
    [
        (_settings("interleaving", rounds=2), 4, 2, 4),
        (_settings("interleaving", rounds=1), 2, 2, 2),
        (_settings("no-transfer"), 2, 2, 2),
        (_settings("warm-start", rounds=2), 4, 2, 2),
        (_settings("joint"), 2, 2, 2),
        (_settings("darts", tasks=TASKS[:1]), 1, 1, 1),
        (_settings("darts-first-order", tasks=TASKS[:1]), 1, 1, 0),
    ],
    ids=lambda v: f"{v.algorithm}, M = {v.rounds}" if isinstance(v, SearchSettings) else None,
)
def test_a_step_costs_the_passes_that_its_algorithm_needs(settings, stages, upper, through, tasks):
    """One pass of each kind for a training batch and a validation batch, and two for a finite difference."""
    finite = settings if settings.algorithm == "darts-first-order" else replace(settings, method=("finite-difference",))
    passes = stages + upper + 2 * through
    assert _counted(tasks[: len(settings.tasks)], finite) == {"forward": passes, "reverse": passes}


@pytest.mark.filterwarnings("ignore:.*negative curvature")
def test_products_are_counted_as_reverse_passes(tasks):
    method = ("conjugate-gradient:max_steps=3,damping=10.0",)
    found = _counted(tasks[:1], _settings("darts", tasks=TASKS[:1], method=method))
    # the stage's step, the validation batch, the graph of the gradient; three products and the mixed one
    assert found["forward"] == 3
    assert found["reverse"] >= 3 + 3


def test_epochs_are_passes_over_the_shortest_training_set(tasks):
    shortest = min(len(task.train) for task in tasks) // TINY.batch_size
    settings = counted_in_steps(tasks, replace(TINY, epochs=3, warmup_epochs=1, stage_steps=2))
    assert (settings.steps, settings.warmup) == (3 * (shortest // 2), shortest // 2)
    assert counted_in_steps(tasks, TINY) is TINY


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_follows_its_schedule(schedule, tasks):
    settings = _settings("joint", schedule=schedule, min_learning_rate=0.01)
    engine = build_engine(tasks, settings)
    engine.run(settings.steps)
    rate = engine.problems["joint"].optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(0.01 if schedule == "cosine" else TINY.learning_rate)


def test_phases_have_the_cells_operations_and_dropout_that_are_given_for_each():
    settings = replace(TINY, shrink_cells=(2, 3), shrink_operations=(8, 3), skip_dropout=(0.0, 0.4))
    first, second = phases(settings)
    assert (first.settings.cells, second.settings.cells) == (2, 3)
    assert (first.operations, second.operations) == (8, 3)
    assert second.settings.shrink_operations == ()
    assert second.skip_dropout_after(0) == 0.4
    assert 0 < second.skip_dropout_after(TINY.steps) < 0.01
    assert [p.operations for p in phases(TINY)] == [0]


def test_lower_precision_is_that_of_the_networks_alone(tasks):
    torch.set_default_dtype(torch.float32)
    single = [load_tasks(TASKS[:1])[0]]
    engine = build_engine(single, _settings("darts", tasks=TASKS[:1], precision="bfloat16"))
    kinds = []
    stage = engine.problems["learner_1_round_1"].module
    stage.encoder.register_forward_hook(lambda module, given, out: kinds.append(out.dtype))
    stage.stem.register_forward_hook(lambda module, given, out: kinds.append(out[0].dtype))
    report = engine.step()["learner_1_round_1"]
    assert torch.bfloat16 in kinds
    assert all(p.dtype == torch.float32 for p in stage.parameters())
    full = build_engine(single, _settings("darts", tasks=TASKS[:1])).step()["learner_1_round_1"]
    assert report.loss != full.loss
    assert report.loss == pytest.approx(full.loss, rel=0.05)


def test_scores_of_full_precision_are_left_alone():
    scores = torch.randn(2)
    assert Precision("float32", torch.device("cpu")).restored(scores) is scores


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SettingsError, match="device = 'nonsense': expected a device of this machine"):
        find_device("nonsense")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm": "sgd"}, "algorithm = 'sgd': expected one of interleaving, no-transfer"),
        ({"algorithm": "darts"}, "expected one task, got 2"),
        ({"algorithm": "joint", "rounds": 2}, "rounds = 2: expected rounds = 1"),
        ({"algorithm": "joint", "task_weights": (1.0,)}, "expected one for each of the 2 tasks"),
        ({"warmup_epochs": 1}, "expected both by epochs or both by steps"),
        ({"epochs": 2, "warmup_epochs": 2}, "warmup_epochs = 2, epochs = 2: expected warmup_epochs to be smaller"),
        ({"min_learning_rate": 0.1}, "Lower min_learning_rate"),
        ({"precision": "float16"}, "expected a CUDA device, or bfloat16"),
        ({"stop_on_eigenvalue": 1.3}, "Give eigenvalue_steps=10"),
        ({"shrink_cells": (2, 3), "shrink_operations": (8,)}, "as many numbers in each"),
        ({"shrink_operations": (5, 3)}, "expected all 8 in the first phase"),
        ({"shrink_operations": (8, 3, 5)}, "numbers that do not grow"),
        ({"shrink_operations": (8, 3), "stop_on_skips": 2}, "expected none where stop_on_skips"),
        ({"skip_dropout": (1.0,)}, "a tuple of numbers of at least 0 and below 1"),
        ({"shrink_operations": (8,), "shrink_cells": (1,)}, "at least 2 cells in each phase"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        replace(TINY, **values)


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [("no-transfer", "proximity"), ("interleaving", "task_weights"), ("darts-first-order", "method")],
)
def test_a_setting_that_an_algorithm_does_not_read_is_refused(algorithm, name):
    with pytest.raises(SettingsError, match=f"it does not read {name}. Leave it out"):
        refuse_unread(algorithm, [name, "steps"])


def test_a_random_architecture_reads_little():
    refuse_unread("random", ["nodes", "seed"])
    with pytest.raises(SettingsError, match="does not read momentum, steps"):
        refuse_unread("random", ["steps", "momentum"])
