"""Signs of collapse in the packaged example's search, when they end it, and progressive phases."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from examples.nas_interleaving import plots
from examples.nas_interleaving.algorithms import build_engine
from examples.nas_interleaving.collapse import Watch, largest_eigenvalue, skip_connections
from examples.nas_interleaving.comparison import found_in
from examples.nas_interleaving.genotype import Genotype, edge_count
from examples.nas_interleaving.operations import OPERATION_NAMES
from examples.nas_interleaving.run_folder import RunFolder
from examples.nas_interleaving.search import search
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.tasks import load_tasks

pytestmark = pytest.mark.filterwarnings("ignore:.*depend on their order")

TASKS = ("digits:0-1", "digits:2-3")
TINY = SearchSettings(
    tasks=TASKS, rounds=1, channels=2, nodes=1, batch_size=8, steps=6, warmup=1, validate_every=1, eigenvalue_steps=40
)


@pytest.fixture(scope="module")
def tasks():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield load_tasks(TASKS)
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    monkeypatch.setattr(plots, "draw_run", lambda folder: None)


def _hessian(engine):
    """Return the Hessian of the validation loss on the batch that is held out, in all of the architecture."""
    upper = engine.problems["architecture"]
    names = list(dict(upper.module.named_parameters()))
    sizes = [p.numel() for p in upper.module.parameters()]
    shapes = [p.shape for p in upper.module.parameters()]

    def loss(flat):
        alphas = dict(zip(names, (v.view(s) for v, s in zip(flat.split(sizes), shapes, strict=True)), strict=True))
        stages = [engine.problems[name].module for name in upper.depends_on]
        return sum(
            F.cross_entropy(stage(images, alphas), labels)
            for stage, (images, labels) in zip(stages, upper.held_out, strict=True)
        )

    flat = torch.cat([p.detach().flatten() for p in upper.module.parameters()])
    return torch.autograd.functional.hessian(loss, flat)


def test_the_eigenvalue_is_the_largest_of_the_hessian_of_the_validation_loss(tasks):
    engine = build_engine(tasks, TINY)
    engine.run(3)
    before = {name: [p.clone() for p in problem.module.parameters()] for name, problem in engine.problems.items()}
    found = engine.validate()["architecture"]["eigenvalue"]
    eigenvalues = torch.linalg.eigvalsh(_hessian(engine))
    assert found == pytest.approx(eigenvalues[-1].item(), rel=1e-8)
    assert eigenvalues[-1] > 0
    for name, problem in engine.problems.items():
        assert all(map(torch.equal, before[name], problem.module.parameters()))


def test_a_few_steps_come_close_from_below(tasks):
    engine = build_engine(tasks, TINY)
    engine.run(3)
    exact = engine.validate()["architecture"]["eigenvalue"]
    engine.problems["architecture"].eigenvalue_steps = 5
    near = engine.validate()["architecture"]["eigenvalue"]
    assert 0.8 * exact < near < exact


def test_the_largest_eigenvalue_is_not_that_of_largest_size():
    x = torch.zeros(3, requires_grad=True)
    loss = (torch.tensor([-9.0, 2.0, 1.0]) * x.square()).sum() / 2
    assert largest_eigenvalue(loss, [x], 3) == pytest.approx(2.0, rel=1e-12)


def test_parameters_that_the_loss_does_not_bend_in_have_eigenvalue_zero():
    x, y = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    assert largest_eigenvalue((x**2).sum() + y.sum(), [x, y], 5) == pytest.approx(2.0, rel=1e-12)


def test_skip_connections_are_counted_in_the_normal_cell():
    weights = {kind: torch.zeros(edge_count(2), len(OPERATION_NAMES)) for kind in ("normal", "reduction")}
    skip, other = OPERATION_NAMES.index("skip_connect"), OPERATION_NAMES.index("sep_conv_3x3")
    weights["reduction"][:, skip] = 1
    weights["normal"][:, other] = 0.5
    assert skip_connections(weights) == 0
    weights["normal"][0, skip] = weights["normal"][3, skip] = 1
    assert skip_connections(weights) == 2


def _watched(eigenvalues, **changes):
    watch = Watch(replace(TINY, **changes))
    for step, value in enumerate(eigenvalues, 1):
        if watch.look(10 * step, {"skip_connections": 0.0, "eigenvalue": value}):
            return step, watch.step
    return None


def test_a_search_ends_when_the_smoothed_eigenvalue_has_grown():
    calm, grown = [1.0] * 10, [1.0, 1.2, 1.4, 1.6, 1.8]
    assert _watched(calm * 3, stop_on_eigenvalue=1.3) is None
    # Means of five are 1, 1.04, 1.12, 1.24, 1.4 after the calm.
    assert _watched(calm + grown, stop_on_eigenvalue=1.3) == (15, 100)
    assert _watched(calm + grown, stop_on_eigenvalue=1.41) is None
    assert _watched([1.0] * 5 + [9.0] * 4, stop_on_eigenvalue=1.3) is None, "ten validations are needed"
    assert _watched([-1.0] * 5 + [9.0] * 9, stop_on_eigenvalue=1.3) == (11, 60), "not before the first mean is positive"


def test_a_search_that_stops_says_why_and_keeps_the_architecture_of_then(tasks, tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    settings = replace(TINY, steps=30, eigenvalue_steps=3, stop_on_eigenvalue=1.0000001)
    genotype = search(folder, tasks, settings)
    status = folder.read_status()
    assert status["state"] == "complete"
    assert 11 <= status["steps"] < 30
    chosen = status["stopped"]["architecture_of_step"]
    assert chosen == status["steps"] - 5
    (line,) = (w for w in folder.read_lines("architecture.jsonl") if w["step"] == chosen)
    assert genotype == Genotype.decode({kind: torch.tensor(line[kind]) for kind in ("normal", "reduction")})
    assert folder.read_genotype() == genotype
    assert f"the architecture of step {chosen}" in found_in(folder).note


def test_skip_connections_end_a_search():
    watch = Watch(replace(TINY, stop_on_skips=2))
    assert [watch.look(step, {"skip_connections": float(n)}) for step, n in ((5, 0), (10, 1), (15, 2))] == [
        False,
        False,
        True,
    ]
    assert (watch.step, watch.reason) == (15, "2 skip connections in the normal cell")


def test_a_progressive_search_goes_on_with_the_operations_that_weighed_most(tasks, tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    settings = replace(
        TINY, steps=3, eigenvalue_steps=0, shrink_cells=(2, 3), shrink_operations=(8, 3), skip_dropout=(0.0, 0.3)
    )
    genotype = search(folder, tasks, settings)
    assert folder.read_status()["steps"] == 6
    lines = {w["step"]: w for w in folder.read_lines("architecture.jsonl")}
    assert sorted(lines) == [0, 1, 2, 3, 4, 5, 6]
    for kind in ("normal", "reduction"):
        for before, after in zip(lines[3][kind], lines[6][kind], strict=True):
            best = sorted(range(8), key=lambda i: -before[i])[:3]
            assert [i for i, w in enumerate(after) if w > 0] == sorted(best)
            assert sum(after) == pytest.approx(1.0, abs=1e-5)
    tables = {kind: torch.tensor(lines[6][kind]) for kind in ("normal", "reduction")}
    assert genotype == Genotype.decode(tables)
    metrics = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    outcomes = [m["outcome"] for m in metrics if m["problem"] == "architecture"]
    assert outcomes == ["warm-up", "stepped", "stepped"] * 2


def test_the_architecture_of_a_search_keeps_to_its_limit_of_skip_connections(tmp_path):
    folder = RunFolder.create(tmp_path / "limited")
    rows = [[0.0, 0.1, 0.1, 0.4, 0.2, 0.1, 0.1, 0.0]] * 2  # skip connections weigh most, then separable convolutions
    folder.append("architecture.jsonl", {"step": 1, "normal": rows, "reduction": rows})
    for limit, expected in (
        (-1, ["skip_connect"] * 2),
        (1, ["sep_conv_3x3", "skip_connect"]),
        (0, ["sep_conv_3x3"] * 2),
    ):
        folder.write_config(SearchSettings(nodes=1, max_skips=limit))
        genotype = folder.decode_weights()
        assert sorted(name for name, _ in genotype.normal[0]) == expected
        assert [name for name, _ in genotype.reduction[0]] == ["skip_connect"] * 2
