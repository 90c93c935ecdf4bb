"""Tables of the packaged example: cells in parts, resumed, by several processes; ablations; what a table says."""

import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.nas_interleaving.cli import main
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.outlier import load
from examples.nas_interleaving.run_folder import RunFolderError
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.table_folder import TableFolder
from examples.nas_interleaving.table_settings import AblateSettings, CompareSettings
from examples.nas_interleaving.tables import make_table, make_verdict
from examples.nas_interleaving.variants import ablated, at_budget, batches_of, compared
from examples.nas_interleaving.workers import work_in_processes

pytestmark = pytest.mark.filterwarnings("ignore:.*depend on their order")

ROOT = Path(__file__).parent.parent
FLAGS = [
    *("--channels", "2", "--nodes", "1", "--batch-size", "8", "--steps", "2", "--warmup", "1", "--rounds", "2"),
    *("--tasks", "digits:0-1", "digits:2-3", "--validate-every", "9", "--method", "stop-gradient"),
    *("--retrain-channels", "2", "--retrain-cells", "2", "--retrain-epochs", "1"),
]
ROWS = ["--algorithms", "interleaving", "darts-first-order", "random", "--seeds", "0", "1"]


@pytest.fixture(autouse=True)
def _single_precision():
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def _accuracies(folder):
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [(r["architecture"], r["seed"], r["task"], r["accuracy"], r["search_passes"]) for r in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a table that was filled at once."""
    folder = tmp_path_factory.mktemp("tables") / "whole"
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert main(["compare", *FLAGS, *ROWS, "--folder", str(folder)]) == 0
    torch.set_default_dtype(dtype)
    return folder


def test_a_table_has_a_cell_for_each_row_and_seed(whole):
    tasks = ("digits:0-1", "digits:2-3")
    assert [found[:3] for found in _accuracies(whole)] == [
        (name, seed, task)
        for name in ("interleaving", "darts-first-order", "random")
        for seed in (0, 1)
        for task in tasks
    ]
    table = (whole / "table.md").read_text()
    assert "search passes" in table
    assert "multiply-adds" in table
    assert "interleaving − random: " in table
    assert "unfinished" not in table
    alone = whole / "cells" / "darts-first-order-seed_1"
    for part, task in (("search", "digits:0-1"), ("search_2", "digits:2-3")):
        settings = json.loads((alone / part / "config.json").read_text())["settings"]
        assert (settings["tasks"], settings["seed"], settings["rounds"]) == ([task], 1, 1)
        assert settings["steps"] == 4, "two rounds, so twice the steps, at the budget of interleaving"


def test_every_row_trains_on_as_many_batches(whole):
    passes = {row: count for row, _, _, _, count in _accuracies(whole)}
    training = {"interleaving": 2 * 2 * 2, "darts-first-order": 2 * 4}  # K·M·steps, and K searches of M·steps
    validation = {"interleaving": 2 * 1, "darts-first-order": 2 * 2}  # the steps after the warm-up
    assert passes["random"] == 0
    for row, batches in training.items():
        assert passes[row] == 2 * (batches + validation[row])


def test_a_killed_table_goes_on_where_it_ended_and_is_the_same(whole, tmp_path):
    folder = tmp_path / "table"
    command = [sys.executable, "-m", "examples.nas_interleaving", "compare", *FLAGS, *ROWS, "--folder", str(folder)]
    second = folder / "cells" / "darts-first-order-seed_0" / "search" / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not second.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert "5 of 6 cells are missing" in (folder / "table.md").read_text()
    first = folder / "cells" / "interleaving-seed_0" / "search" / "metrics.jsonl"
    before = first.stat().st_mtime_ns
    (second.parent.parent / "left").write_text("what a killed process was writing")
    assert main(["compare", "--folder", str(folder)]) == 0
    assert first.stat().st_mtime_ns == before, "a complete cell is not done again"
    assert not (second.parent.parent / "left").exists(), "an unfinished one is done anew"
    assert _accuracies(folder) == _accuracies(whole)


def test_two_processes_fill_one_table(whole, tmp_path, capfd):
    folder = tmp_path / "table"
    assert main(["compare", *FLAGS, *ROWS, "--folder", str(folder), "--jobs", "2"]) == 0
    assert _accuracies(folder) == _accuracies(whole)
    printed = capfd.readouterr().out
    assert printed.count("cells are done; now ") == 6, "each cell is done once"
    assert (folder / "worker_2.log").exists()


def test_a_broken_cell_is_named(whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "table")
    (folder / "cells" / "random-seed_1" / "status.json").write_text("no JSON")
    assert main(["compare", "--folder", str(folder)]) == 2
    assert "status.json cannot be read" in capsys.readouterr().err


def test_a_process_that_fails_is_told_of(whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "table")
    shutil.rmtree(folder / "cells" / "random-seed_1")
    shutil.rmtree(folder / "locks")
    (folder / "locks").write_text("no folder")
    with pytest.raises(RunFolderError, match=r"a process has failed; see the end of .*worker_1\.log"):
        work_in_processes(TableFolder(folder), 1)
    assert "Error" in (folder / "worker_1.log").read_text()


def test_a_cell_that_somebody_works_on_is_left_to_them(whole, tmp_path):
    table = TableFolder(tmp_path / "table")
    plan = TableFolder(whole).read_plan()
    table.create(replace(plan, table=replace(plan.table, algorithms=("random",))))
    theirs, other = table.read_plan().cells()
    with table._held(theirs.name, wait=False) as held:
        assert held
        table.work(said=lambda _: None)
    assert not table.part(theirs).path.exists()
    assert table.is_done(other)


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("compare", ["--steps", "3"], "steps = 3: the table in this folder has 2"),
        ("compare", ["--seeds", "0"], r"seeds = (0,): the table in this folder has (0, 1)"),
        ("compare", ["--retrain-epochs", "9"], "retrain_epochs = 9: the table in this folder has 1"),
        ("compare", ["--image-size", "9"], "image_size = 9: the table in this folder has 0"),
        ("ablate", [], "holds a table of the other kind"),
    ],
)
def test_other_settings_than_those_stored_are_refused(command, flags, message, whole, capsys):
    assert main([command, "--folder", str(whole), *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_same_settings_again_do_nothing(whole, capsys):
    assert main(["compare", *FLAGS, *ROWS, "--folder", str(whole)]) == 0
    assert "6 cells; 6 of them are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algorithms", "sgd"], "algorithms: unknown 'sgd'"),
        (["--algorithms", "joint", "joint"], "'joint' is given twice"),
        (["--algorithms", "joint:proximity=2"], "it does not read proximity"),
        (["--algorithms", "joint:lambda=2"], "unknown setting 'lambda'"),
        (["--algorithms", "interleaving:rounds=two"], "expected int for rounds, got 'two'"),
        (["--algorithms", "interleaving:seed=2"], "expected setting=value, got 'seed=2'"),
        (["--algorithms", "joint:method=newton"], "unknown name 'newton'"),
        (["--batch-size", "5000"], "Lower batch_size"),
        (["--seeds", "1", "1"], "seeds = (1, 1): expected different ones"),
        (["--jobs", "2", "--threads", "2"], "threads = 2: each of 2 jobs has one"),
        (["--steps", "3", "--epochs", "2"], "steps and epochs are both given"),
        (["--retrain-batch-size", "5000"], "Lower retrain_batch_size"),
    ],
)
def test_a_table_that_cannot_be_filled_is_refused_before_anything_is_written(flags, message, tmp_path, capsys):
    assert main(["compare", *FLAGS, *flags, "--folder", str(tmp_path / "table")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "table").exists()


def test_epochs_are_counted_in_steps_for_equal_budgets(tmp_path, capsys):
    flags = [*FLAGS[:6], "--epochs", "2", "--warmup-epochs", "1", *FLAGS[10:]]
    folder = tmp_path / "table"
    assert main(["compare", *flags, "--algorithms", "random", "--seeds", "0", "--folder", str(folder)]) == 0
    plan = TableFolder(folder).read_plan()
    assert (plan.search.epochs, plan.counted.epochs) == (2, 0)
    shortest = min(len(task.train) for task in load(plan.search.tasks, plan.data)) // 8
    assert (plan.counted.steps, plan.counted.warmup) == (2 * shortest, shortest)
    assert main(["compare", *flags, "--folder", str(folder)]) == 0, "the same settings again"
    assert main(["compare", "--epochs", "3", "--folder", str(folder)]) == 2
    assert "epochs = 3: the table in this folder has 2" in capsys.readouterr().err


def test_a_warm_up_in_steps_does_not_go_with_a_preset_in_epochs(tmp_path, capsys):
    flags = ["--preset", "darts-cifar", "--warmup", "2", "--tasks", "digits", "--folder", str(tmp_path / "run")]
    assert main(["search", *flags]) == 2
    assert "warmup counts steps, and epochs = 50 are given. Give warmup_epochs" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "precious").write_text("kept")
    assert main(["compare", *FLAGS, "--folder", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


BASE = SearchSettings(tasks=("a", "b", "c"), rounds=2, steps=10, warmup=4, stage_steps=2)


@pytest.mark.parametrize(
    "row", ["interleaving:rounds=1", "interleaving:rounds=3,stage_steps=1", "joint", "no-transfer"]
)
def test_rows_have_the_budget_of_the_settings_given(row):
    (variant,) = compared(CompareSettings(algorithms=(row,)))
    (settings,) = variant.searches(BASE, "equal", seed=7)
    assert batches_of(settings) == pytest.approx(batches_of(BASE), abs=batches_of(settings) / settings.steps / 2)
    assert settings.warmup / settings.steps == pytest.approx(0.4, abs=0.05)
    assert settings.seed == 7
    (settings,) = variant.searches(BASE, "steps", seed=7)
    assert settings.steps == BASE.steps


def test_the_searches_of_darts_share_the_budget():
    (variant,) = compared(CompareSettings(algorithms=("darts",)))
    searches = variant.searches(BASE, "equal", seed=0)
    assert [s.tasks for s in searches] == [("a",), ("b",), ("c",)]
    assert sum(map(batches_of, searches)) == batches_of(BASE)


def test_a_budget_of_one_step_has_no_warm_up():
    assert (at_budget(BASE, 1).steps, at_budget(BASE, 1).warmup) == (1, 0)


def test_a_row_can_have_a_method_with_options():
    (variant,) = compared(CompareSettings(algorithms=("interleaving:method=neumann:terms=5,scale=0.1,rounds=1",)))
    assert variant.changes == {"method": ("neumann:terms=5,scale=0.1",), "rounds": 1}


def test_ablations_vary_one_thing_at_a_time():
    rows = {v.label: v.changes for v in ablated(AblateSettings(), BASE)}
    assert rows == {
        "as given": {},
        "rounds=1": {"rounds": 1},
        "rounds=3": {"rounds": 3},
        "proximity=0": {"proximity": 0.0},
        "proximity=0.1": {"proximity": 0.1},
        "proximity=10": {"proximity": 10.0},
        "learners=1": {"tasks": ("a",)},
        "learners=2": {"tasks": ("a", "b")},
        "order=3-2-1": {"tasks": ("c", "b", "a")},
        "order=2-3-1": {"tasks": ("b", "c", "a")},
        "order=3-1-2": {"tasks": ("c", "a", "b")},
        "with shuffled:a": {"tasks": ("a", "b", "c", "shuffled:a")},
    }
    assert [v.label for v in ablated(AblateSettings(vary=("outlier",), outlier="d"), BASE)] == ["as given", "with d"]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("rounds", "expected values"),
        ("depth=2", "expected rounds=VALUES, proximity=VALUES"),
        ("learners=4", "at most the 3 tasks given"),
        ("order=1-2", "expected rounds=VALUES"),
    ],
)
def test_what_cannot_be_varied_is_refused(vary, message):
    with pytest.raises(ValueError, match=message):
        ablated(AblateSettings(vary=(vary,)), BASE)


def test_an_outlier_takes_part_and_is_not_tested(tmp_path):
    folder = tmp_path / "table"
    assert main(["ablate", *FLAGS, "--vary", "outlier", "learners", "--seeds", "0", "--folder", str(folder)]) == 0
    assert [found[:3] for found in _accuracies(folder)] == [
        ("as given", 0, "digits:0-1"),
        ("as given", 0, "digits:2-3"),
        ("with shuffled:digits:0-1", 0, "digits:0-1"),
        ("with shuffled:digits:0-1", 0, "digits:2-3"),
        ("learners=1", 0, "digits:0-1"),
    ]
    passes = {row: count for row, _, _, _, count in _accuracies(folder)}
    assert passes["with shuffled:digits:0-1"] == 1.5 * passes["as given"] == 3 * passes["learners=1"]


def test_a_shuffled_task_has_the_pixels_of_all_images_in_one_other_order():
    plain, shuffled = load(["digits:0-1", "shuffled:digits:0-1"], DataSettings(augment=False))
    assert shuffled.name == "shuffled:digits:0-1"
    for part in ("train", "test"):
        for i in (0, 5):
            (image, label), (moved, same) = getattr(plain, part)[i], getattr(shuffled, part)[i]
            assert label == same
            assert not torch.equal(image, moved)
            assert torch.equal(image.flatten().sort().values, moved.flatten().sort().values)
    batch, _ = next(iter(shuffled.batches("train", 8, 0, option="batch_size")))
    images, _ = next(iter(plain.batches("train", 8, 0, option="batch_size")))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(batch.flatten(1), images.flatten(1)[:, order]), "changed as the plain one, and then shuffled"


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
