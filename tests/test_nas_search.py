"""The search of the packaged example: its graph, its gradient, its command line and what it leaves on disk."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mlo
from examples.nas_interleaving.cli import main
from examples.nas_interleaving.comparison import make_table, make_verdict
from examples.nas_interleaving.genotype import Genotype
from examples.nas_interleaving.interleaving import build_engine, encoder_weights, stage_names
from examples.nas_interleaving.methods import parse_method, stage_methods
from examples.nas_interleaving.settings import RetrainSettings, SearchSettings, SettingsError
from examples.nas_interleaving.tasks import load_tasks

ROOT = Path(__file__).parent.parent
TINY = SearchSettings(channels=2, nodes=2, batch_size=8, steps=3, warmup=1, validate_every=2)
TINY_FLAGS = [
    *("--channels", "2", "--nodes", "2", "--batch-size", "8", "--steps", "3", "--warmup", "1"),
    *("--validate-every", "2", "--tasks", "digits:0-1", "digits:2-3"),
]
RETRAIN_FLAGS = ["--retrain-channels", "2", "--retrain-cells", "2", "--retrain-epochs", "1"]


@pytest.fixture(autouse=True)
def _single_precision():
    """What users have, unlike the other tests."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


PNG = b"\x89PNG\r\n\x1a\n"


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
    assert set(params) - set(encoder_weights(params)) == {"head.weight", "head.bias"}


def test_methods_are_chosen_per_stage():
    stages = ["a", "b"]
    chosen = stage_methods(["neumann:terms=5,scale=0.1", "b=conjugate-gradient:max_steps=3"], stages)
    assert chosen == {"a": mlo.Neumann(terms=5, scale=0.1), "b": mlo.ConjugateGradient(max_steps=3)}
    assert parse_method("finite-difference") == mlo.FiniteDifference()
    engine = build_engine(load_tasks(TINY.tasks), replace(TINY, method=("learner_2_round_1=stop-gradient",)))
    assert engine.graph.method("learner_2_round_1") == mlo.StopGradient()
    assert engine.graph.method("learner_1_round_1") == mlo.FiniteDifference()


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
    ("kind", "values", "message"),
    [
        (SearchSettings, {"steps": 0}, "steps = 0: expected an integer of at least 1"),
        (SearchSettings, {"channels": 3}, "channels = 3: expected an even number"),
        (SearchSettings, {"proximity": float("nan")}, "proximity = nan: expected a number of at least 0"),
        (SearchSettings, {"lambda": 1}, "unknown settings lambda"),
        (RetrainSettings, {"retrain_learning_rate": -1.0}, "expected a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(kind, values, message):
    with pytest.raises(SettingsError, match=message):
        kind.from_dict(values)


def _lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_one_command_leaves_everything_in_its_folder(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["run", *TINY_FLAGS, *RETRAIN_FLAGS, "--folder", str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["steps"] == 3
    assert config["versions"]["torch"] == torch.__version__
    metrics = _lines(folder / "metrics.jsonl")
    stages = stage_names(2, 2)
    assert [(m["step"], m["problem"]) for m in metrics] == [
        (step, name) for step in (1, 2, 3) for name in (*stages, "architecture")
    ]
    assert [m["outcome"] for m in metrics if m["problem"] == "architecture"] == ["warm-up", "stepped", "stepped"]
    assert all((m["validation"] is not None) == (m["step"] == 2 and m["problem"] in stages) for m in metrics)
    for m in metrics:
        if m["problem"] == "learner_2_round_1":
            expected = m["metrics"]["fit"] + TINY.proximity * m["metrics"]["squared_distance"]
            assert m["loss"] == pytest.approx(expected, rel=1e-5)
    weights = _lines(folder / "architecture.jsonl")
    assert [w["step"] for w in weights] == [0, 1, 2, 3]
    assert weights[0] | {"step": 1} == weights[1], "the architecture waits during the warm-up"
    assert weights[1]["normal"] != weights[3]["normal"]
    genotype = Genotype.from_json((folder / "genotype.json").read_text())
    tables = {kind: torch.tensor(weights[3][kind]) for kind in ("normal", "reduction")}
    assert genotype == Genotype.decode(tables)
    assert json.loads((folder / "status.json").read_text())["state"] == "complete"
    drawn = (folder / "graph.mmd").read_text()
    assert 'p1["learner_1_round_1"]' in drawn
    assert "p1 -->|response| p2" in drawn
    for name in ("cells.png", "losses.png", "architecture.png"):
        assert (folder / name).read_bytes().startswith(PNG)
    results = _lines(folder / "evaluation" / "results.jsonl")
    assert [(r["architecture"], r["task"]) for r in results] == [
        (a, t) for a in ("interleaving", "random") for t in ("digits:0-1", "digits:2-3")
    ]
    assert all(0 <= r["accuracy"] <= 1 and r["parameters"] > 0 for r in results)
    printed = capsys.readouterr().out
    assert (folder / "evaluation" / "table.md").read_text().strip() in printed
    assert not list(folder.rglob(".*"))


def test_search_then_evaluate_then_plot_is_the_same_as_one_command(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["run", *TINY_FLAGS, *RETRAIN_FLAGS, "--folder", str(whole)]) == 0
    assert main(["search", *TINY_FLAGS, "--folder", str(parts)]) == 0
    assert main(["evaluate", str(parts), *RETRAIN_FLAGS]) == 0
    for name in ("metrics.jsonl", "architecture.jsonl", "genotype.json"):
        assert (whole / name).read_text() == (parts / name).read_text(), "one seed, one result"
    a, b = (_lines(folder / "evaluation" / "results.jsonl") for folder in (whole, parts))
    assert [(r["accuracy"], r["loss"]) for r in a] == [(r["accuracy"], r["loss"]) for r in b]
    (parts / "cells.png").unlink()
    assert main(["plot", str(parts)]) == 0
    assert (parts / "cells.png").exists()
    assert main(["evaluate", str(parts), *RETRAIN_FLAGS, "--tasks", "digits:4-6"]) == 0
    assert {r["task"] for r in _lines(parts / "evaluation_2" / "results.jsonl")} == {"digits:4-6"}


def test_another_seed_is_another_search(tmp_path):
    for seed in ("0", "1"):
        assert main(["search", *TINY_FLAGS, "--seed", seed, "--folder", str(tmp_path / seed)]) == 0
    assert (tmp_path / "0" / "metrics.jsonl").read_text() != (tmp_path / "1" / "metrics.jsonl").read_text()


def test_compare_adds_darts_on_each_task_and_several_seeds(tmp_path, capsys):
    folder = tmp_path / "compared"
    flags = ["--compare", "--seeds", "0", "1", "--folder", str(folder)]
    assert main([*flags, *TINY_FLAGS, *RETRAIN_FLAGS]) == 0, "run is the command where none is named"
    results = _lines(folder / "evaluation" / "results.jsonl")
    names = ["interleaving", "random", "DARTS on digits:0-1", "DARTS on digits:2-3"]
    assert [(r["seed"], r["architecture"], r["task"]) for r in results] == [
        (seed, name, task) for seed in (0, 1) for name in names for task in ("digits:0-1", "digits:2-3")
    ]
    for seed in (0, 1):
        for part in ("interleaving", "darts", "darts_2"):
            assert (folder / f"seed_{seed}" / part / "genotype.json").exists()
    settings = json.loads((folder / "seed_1" / "darts_2" / "config.json").read_text())["settings"]
    assert (settings["tasks"], settings["rounds"], settings["seed"]) == (["digits:2-3"], 1, 1)
    assert "± " in capsys.readouterr().out


def test_the_table_has_means_and_spreads_over_seeds():
    def row(name, seed, task, accuracy):
        fixed = {"parameters": 10, "search_seconds": 2}
        return {"architecture": name, "seed": seed, "task": task, "accuracy": accuracy, **fixed}

    results = [row("x", s, t, a) for s, t, a in ((0, "p", 0.9), (0, "q", 0.7), (1, "p", 0.8), (1, "q", 0.9))]
    results += [row("y", 0, "p", 0.5), row("y", 0, "q", 0.6), row("y", 1, "p", 0.7)]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in make_table(results).splitlines()]
    spread_p, spread_q = statistics.stdev([90, 80]), statistics.stdev([70, 90])
    assert lines[2][:5] == ["x", f"85.00 ± {spread_p:.2f}", f"80.00 ± {spread_q:.2f}", "82.50 ± 3.54", "2"]
    assert lines[3][:4] == ["y", "60.00 ± 14.14", "60.00", "55.00"], "a seed without all tasks has no mean"
    assert make_verdict(results) == "x − y: +25.00 points (one seed, so its spread is unknown)."
    results.append(row("y", 1, "q", 0.99))
    assert make_verdict(results) == "x − y: +12.75 points ± 17.32 over 2 seeds, within the spread."


def _run_in_background(folder, *flags):
    command = [sys.executable, "-m", "examples.nas_interleaving", "run", *TINY_FLAGS, *flags, "--folder", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_interruption_leaves_a_readable_folder(tmp_path):
    folder = tmp_path / "run"
    process = _run_in_background(folder, "--steps", "100000")
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert f"What is done so far is in {folder}" in errors
    assert "Traceback" not in errors
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert status["steps"] >= 1
    assert len(_lines(folder / "metrics.jsonl")) >= 5 * (status["steps"] - 1)
    weights = _lines(folder / "architecture.jsonl")
    Genotype.from_json((folder / "genotype.json").read_text())
    assert weights
    assert (folder / "cells.png").read_bytes().startswith(PNG)
    assert main(["evaluate", str(folder), *RETRAIN_FLAGS]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "mnist"], "unknown task 'mnist'"),
        (["--method", "newton"], "unknown name 'newton'"),
        (["--steps", "0"], "steps = 0: expected an integer of at least 1"),
        (["--batch-size", "5000"], "learner_1_round_1"),
        (["--method", "neumann:terms=0"], "terms"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, capsys, flags, message):
    folder = tmp_path / "run"
    assert main(["search", *TINY_FLAGS, *flags, "--folder", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_a_run_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "precious").write_text("kept")
    assert main(["search", *TINY_FLAGS, "--folder", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["precious"]


def test_evaluating_what_is_no_search_is_refused(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "nothing")]) == 2
    assert "does not exist; expected the folder of a search" in capsys.readouterr().err
    assert main(["search", *TINY_FLAGS, "--folder", str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "genotype.json").write_text('{"normal": []}')
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "genotype.json cannot be read" in capsys.readouterr().err


def test_training_data_smaller_than_a_batch_is_refused(tmp_path, capsys):
    flags = ["--retrain-batch-size", "5000", "--folder", str(tmp_path / "run")]
    assert main(["run", *TINY_FLAGS, *flags]) == 2
    assert "Lower retrain_batch_size (now 5000)" in capsys.readouterr().err
