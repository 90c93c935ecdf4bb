"""The problems of the packaged example's search: their graph, its gradient, methods and settings by name."""

from dataclasses import replace

import pytest
import torch

import mlo
from examples.nas_interleaving.algorithms import build_engine
from examples.nas_interleaving.interleaving import stage_names
from examples.nas_interleaving.methods import parse_method, stage_methods
from examples.nas_interleaving.options import SettingsError
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.settings import RetrainSettings
from examples.nas_interleaving.stages import encoder_weights
from examples.nas_interleaving.tasks import TaskError, load_tasks

TINY = SearchSettings(channels=2, nodes=2, batch_size=8, steps=3, warmup=1, validate_every=2)


@pytest.mark.parametrize(("learners", "rounds"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_the_graph_is_a_chain_of_all_turns_under_the_architecture(learners, rounds):
    names = ["digits:0-1", "digits:2-3", "digits:4-5"][:learners]
    engine = build_engine(load_tasks(names), replace(TINY, tasks=tuple(names), rounds=rounds))
    stages = [f"learner_{k}_round_{m}" for m in range(1, rounds + 1) for k in range(1, learners + 1)]
    assert engine.graph.names == (*stages, "architecture")
    assert engine.graph.roots == ("architecture",)
    expected = []
    for position, stage in enumerate(stages):
        if position:
            expected.append((stage, stages[position - 1], "response"))
        expected.append((stage, "architecture", "constraint"))
    expected += [("architecture", stage, "response") for stage in stages[-learners:]]
    assert engine.graph.edges() == tuple(expected)


def test_one_step_of_the_architecture_solves_every_stage_once():
    engine = build_engine(load_tasks(TINY.tasks), replace(TINY, rounds=2, warmup=0))
    solves = engine.step()["architecture"].solves
    assert {path: s.solves for path, s in solves.items()} == {
        f"architecture/{name}": 1 for name in stage_names(len(TINY.tasks), 2)
    }


def test_the_hypergradient_is_the_chain_rule_of_the_paper_written_by_hand():
    """Two learners, one round, the inverse Hessian replaced by the learning rate: every term by double backward."""
    torch.set_default_dtype(torch.float64)
    engine = build_engine(
        load_tasks(TINY.tasks), replace(TINY, rounds=1, method=("identity:scale=None",), warmup=0, proximity=0.3)
    )
    engine.run(2)
    found = engine.hypergradient("architecture")
    first, second, top = (engine.problems[n] for n in ("learner_1_round_1", "learner_2_round_1", "architecture"))
    alphas = dict(top.module.named_parameters())
    stage_batches = [engine._members[p.name].micro_batches[0][0] for p in (first, second)]
    top_batches = engine._members["architecture"].micro_batches[0][0]

    def scores(problem, batch):
        return torch.nn.functional.cross_entropy(problem.module(batch[0], alphas), batch[1])

    weights = [list(problem.module.parameters()) for problem in (first, second)]
    names = [n for n, _ in first.module.named_parameters()]
    encoder = [i for i, n in enumerate(names) if n.startswith("encoder.")]
    upper = sum(scores(p, b) for p, b in zip((first, second), top_batches, strict=True))
    a = list(alphas.values())
    direct = torch.autograd.grad(upper, a, retain_graph=True)
    c1 = torch.autograd.grad(upper, weights[0], retain_graph=True)
    c2 = torch.autograd.grad(upper, weights[1])
    distance = sum((weights[1][i] - weights[0][i]).square().sum() for i in encoder)
    loss2 = scores(second, stage_batches[1]) + 0.3 * distance
    rate2 = second.optimizer.param_groups[0]["lr"]
    g2 = torch.autograd.grad(loss2, weights[1], create_graph=True)
    through2 = torch.autograd.grad(g2, [*a, *(weights[0][i] for i in encoder)], [rate2 * c for c in c2])
    c1 = list(c1)
    for i, t in zip(encoder, through2[len(a) :], strict=True):
        c1[i] = c1[i] - t
    rate1 = first.optimizer.param_groups[0]["lr"]
    g1 = torch.autograd.grad(scores(first, stage_batches[0]), weights[0], create_graph=True)
    through1 = torch.autograd.grad(g1, a, [rate1 * c for c in c1])
    for name, d, t2, t1 in zip(alphas, direct, through2, through1, strict=False):
        torch.testing.assert_close(found[name], d - t2 - t1, rtol=1e-10, atol=1e-14)
        assert (t2 + t1).norm() > 1e-3 * d.norm(), "the indirect part must not vanish beside the direct one"


def test_all_stages_start_from_one_encoder_and_only_encoders_are_drawn_together():
    engine = build_engine(load_tasks(TINY.tasks), TINY)
    modules = [engine.problems[name].module for name in stage_names(2, 2)]
    for other in modules[1:]:
        assert all(
            torch.equal(a, b) for a, b in zip(modules[0].encoder.parameters(), other.encoder.parameters(), strict=True)
        )
    assert torch.equal(modules[0].head.weight, modules[2].head.weight)
    assert not torch.equal(modules[0].head.weight, modules[1].head.weight)
    params = dict(modules[0].named_parameters())
    own = set(params) - set(encoder_weights(params))
    assert own == {"stem.conv.0.weight", "stem.fit.conv.weight", "head.weight", "head.bias"}


def test_methods_are_chosen_per_stage():
    stages = ["a", "b"]
    chosen = stage_methods(["neumann:terms=5,scale=0.1", "b=conjugate-gradient:max_steps=3"], stages)
    assert chosen == {"a": mlo.Neumann(terms=5, scale=0.1), "b": mlo.ConjugateGradient(max_steps=3)}
    assert stage_methods(["b=stop-gradient", "identity"], stages) == {"a": mlo.Identity(), "b": mlo.StopGradient()}
    assert parse_method("finite-difference") == mlo.FiniteDifference()
    engine = build_engine(load_tasks(TINY.tasks), replace(TINY, method=("learner_2_round_1=stop-gradient",)))
    assert engine.graph.method("learner_2_round_1") == mlo.StopGradient()
    assert engine.graph.method("learner_1_round_1") == mlo.Identity()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("newton", "unknown name 'newton'; expected one of finite-difference"),
        ("neumann:steps=3", "unknown option 'steps'; neumann has"),
        ("neumann:terms", "expected option=value, got 'terms'"),
        ("stage_9=neumann", "unknown stage 'stage_9'; the stages are a"),
    ],
)
def test_unknown_methods_are_refused(text, message):
    with pytest.raises(SettingsError, match=message):
        stage_methods([text], ["a"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["neumann:terms=5", "identity"], "two methods for all stages, 'neumann:terms=5' and 'identity'; expected one"),
        (
            ["a=neumann", "identity", "a=identity:scale=0.1"],
            "two methods for stage 'a', 'neumann' and 'identity:scale=0.1'",
        ),
    ],
)
def test_two_methods_for_one_stage_are_refused(texts, message):
    with pytest.raises(SettingsError, match=message):
        stage_methods(texts, ["a", "b"])


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (SearchSettings, {"steps": 0}, "steps = 0: expected an integer of at least 1"),
        (SearchSettings, {"channels": 3}, "channels = 3: expected an even number"),
        (SearchSettings, {"proximity": float("nan")}, "proximity = nan: expected a number of at least 0"),
        (SearchSettings, {"proximity": "1"}, "proximity = '1': expected a number of at least 0"),
        (SearchSettings, {"lambda": 1}, "unknown settings lambda"),
        (SearchSettings, {"method": "cg"}, r"method = 'cg': expected a tuple of texts, e\.g\. \(\"neumann\",\)"),
        (SearchSettings, {"warmup": 9, "steps": 9}, "warmup = 9, steps = 9: expected warmup to be smaller than steps"),
        (RetrainSettings, {"retrain_learning_rate": -1.0}, "expected a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(kind, values, message):
    with pytest.raises(SettingsError, match=message):
        kind.from_dict(values)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "at least one task, got none"),
        (["digits:0-1", "digits:0-1"], "'digits:0-1' is given twice; expected a different name for each task"),
    ],
)
def test_tasks_that_do_not_go_together_build_no_engine(tasks, message):
    with pytest.raises(TaskError, match=message):
        build_engine([load_tasks([name])[0] for name in tasks], TINY)
