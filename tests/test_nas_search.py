"""The search of the packaged example: its command line, and what it leaves on disk."""

import contextlib
import io
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from examples.nas_interleaving import commands, comparison
from examples.nas_interleaving import search as search_module
from examples.nas_interleaving.cli import main
from examples.nas_interleaving.genotype import Genotype
from examples.nas_interleaving.interleaving import stage_names
from examples.nas_interleaving.retrain import retrain
from examples.nas_interleaving.run_folder import RunFolder
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.tasks import load_tasks

# Finite differences say so: the max pooling of networks with two channels has kinks nearly everywhere.
pytestmark = pytest.mark.filterwarnings("ignore:.*depend on their order")

ROOT = Path(__file__).parent.parent
TINY = SearchSettings(channels=2, nodes=2, batch_size=8, steps=3, warmup=1, validate_every=2)
TINY_FLAGS = [
    *("--channels", "2", "--nodes", "2", "--batch-size", "8", "--steps", "3", "--warmup", "1"),
    *("--validate-every", "2", "--tasks", "digits:0-1", "digits:2-3"),
]
RETRAIN_FLAGS = ["--retrain-channels", "2", "--retrain-cells", "2", "--retrain-epochs", "1"]


@contextlib.contextmanager
def _as_users_have_it():
    """Single precision, unlike the other tests; and one thread, since several only hinder networks this small."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _single_precision():
    with _as_users_have_it():
        yield


PNG = b"\x89PNG\r\n\x1a\n"


def _lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def one_run(tmp_path_factory):
    """The folder of a run, to look at, and what the run printed."""
    folder, printed = tmp_path_factory.mktemp("nas") / "run", io.StringIO()
    with _as_users_have_it(), contextlib.redirect_stdout(printed):
        assert main(["run", *TINY_FLAGS, *RETRAIN_FLAGS, "--folder", str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.fixture
def searched(one_run, tmp_path):
    """The folder of a search, to do anything with."""
    return Path(shutil.copytree(one_run[0], tmp_path / "searched", ignore=shutil.ignore_patterns("evaluation")))


def test_one_command_leaves_everything_in_its_folder(one_run):
    folder, printed = one_run
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["steps"] == 3
    assert config["versions"]["torch"] == torch.__version__
    metrics = _lines(folder / "metrics.jsonl")
    stages = stage_names(2, 2)
    assert [(m["step"], m["problem"]) for m in metrics] == [
        (step, name) for step in (1, 2, 3) for name in (*stages, "architecture")
    ]
    assert [m["outcome"] for m in metrics if m["problem"] == "architecture"] == ["warm-up", "stepped", "stepped"]
    assert all((m["validation"] is not None) == (m["step"] == 2) for m in metrics)
    (signs,) = (m["validation"] for m in metrics if m["step"] == 2 and m["problem"] == "architecture")
    for m in metrics:
        if m["problem"] == "learner_2_round_1":
            expected = m["metrics"]["fit"] + TINY.proximity * m["metrics"]["squared_distance"]
            assert m["loss"] == pytest.approx(expected, rel=1e-5)
    weights = _lines(folder / "architecture.jsonl")
    assert [w["step"] for w in weights] == [0, 1, 2, 3]
    assert weights[0] | {"step": 1} == weights[1], "the architecture waits during the warm-up"
    assert weights[1]["normal"] != weights[3]["normal"]
    second = Genotype.decode({kind: torch.tensor(weights[2][kind]) for kind in ("normal", "reduction")})
    assert signs == {"skip_connections": sum(name == "skip_connect" for node in second.normal for name, _ in node)}
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
    assert (folder / "evaluation" / "table.md").read_text().strip() in printed
    assert not list(folder.rglob(".*"))


def test_search_then_evaluate_then_plot_is_the_same_as_one_command(one_run, tmp_path):
    whole, parts = one_run[0], tmp_path / "parts"
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


def test_another_seed_is_another_search(tmp_path, searched):
    assert main(["search", *TINY_FLAGS, "--seed", "1", "--folder", str(tmp_path / "1")]) == 0
    assert (searched / "metrics.jsonl").read_text() != (tmp_path / "1" / "metrics.jsonl").read_text()


@contextlib.contextmanager
def _children_heed_ctrl_c():
    """Undo what a shell does to commands in its background: they, and their children, are to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _stopped(folder, sent):
    """Send a signal to a search of many steps after some of them; return its exit status and what it printed."""
    flags = [*TINY_FLAGS, "--rounds", "1", "--nodes", "1", "--steps", "100000", "--threads", "1"]
    command = [sys.executable, "-m", "examples.nas_interleaving", "search", *flags, "--folder", str(folder)]
    with _children_heed_ctrl_c():
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, errors


def _check_unfinished(folder, state, capsys):
    """Check that all that is known of an unfinished search can be had from its folder."""
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == state
    weights = list(RunFolder(folder).read_lines("architecture.jsonl"))
    assert weights[-1]["step"] in (status["steps"], status["steps"] + 1)
    capsys.readouterr()
    assert main(["evaluate", str(folder), *RETRAIN_FLAGS]) == 0
    printed = capsys.readouterr()
    note = rf"The search is unfinished: {state}.* after {status['steps']} of 100000 steps"
    for text in (printed.err, printed.out, (folder / "evaluation" / "table.md").read_text()):
        assert re.search(note, text)
    assert main(["plot", str(folder)]) == 0
    assert (folder / "cells.png").read_bytes().startswith(PNG)
    tables = {kind: torch.tensor(weights[-1][kind]) for kind in ("normal", "reduction")}
    assert RunFolder(folder).read_genotype() == Genotype.decode(tables)


@pytest.mark.parametrize(("sent", "exit_status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_leaves_a_readable_folder(sent, exit_status, tmp_path, capsys):
    folder = tmp_path / "run"
    returned, errors = _stopped(folder, sent)
    assert returned == exit_status, errors
    assert f"Interrupted. What is done so far is in {folder}" in errors
    assert "Traceback" not in errors
    assert (folder / "genotype.json").exists()
    assert (folder / "cells.png").read_bytes().startswith(PNG)
    _check_unfinished(folder, "interrupted", capsys)


def test_a_killed_search_can_be_evaluated_and_plotted(tmp_path, capsys):
    folder = tmp_path / "run"
    returned, _ = _stopped(folder, signal.SIGKILL)
    assert returned == -signal.SIGKILL
    assert not (folder / "genotype.json").exists()
    for file in ("architecture.jsonl", "metrics.jsonl"):
        with (folder / file).open("a") as lines:
            lines.write('{"step": 7, "normal": [[0.1')
    _check_unfinished(folder, "running", capsys)


def test_the_status_is_current_at_every_step(tmp_path, monkeypatch):
    found = []

    def look(*_):
        found.append(json.loads((tmp_path / "run" / "status.json").read_text()))

    monkeypatch.setattr(search_module, "_show", look)
    search_module.search(RunFolder.create(tmp_path / "run"), load_tasks(TINY.tasks), TINY)
    look()
    assert [(status["state"], status["steps"]) for status in found] == [
        ("running", 1),
        ("running", 2),
        ("running", 3),
        ("complete", 3),
    ]


def test_metrics_of_a_first_step_that_was_cut_short_are_drawn(searched):
    lines = (searched / "metrics.jsonl").read_text().splitlines(keepends=True)
    (searched / "metrics.jsonl").write_text(lines[0] + lines[1][:40])
    assert main(["plot", str(searched)]) == 0


@pytest.mark.parametrize("command", ["run", "evaluate"])
@pytest.mark.parametrize("networks", [0, 3])
def test_an_interrupted_evaluation_keeps_its_results(networks, command, tmp_path, searched, monkeypatch, capsys):
    left = iter(range(networks))

    def interrupted_at_last(*given, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return retrain(*given, **options)

    monkeypatch.setattr(comparison, "retrain", interrupted_at_last)
    monkeypatch.setattr(commands, "search", lambda folder, *_, **__: _copied(searched, folder))
    folder = tmp_path / "run" if command == "run" else searched
    arguments = [*TINY_FLAGS, "--folder", str(folder)] if command == "run" else [str(folder)]
    assert main([command, *arguments, *RETRAIN_FLAGS]) == 130
    part = folder / "evaluation"
    assert f"What is done so far is in {folder if command == 'run' else part}." in capsys.readouterr().err
    status = json.loads((part / "status.json").read_text())
    assert (status["state"], status["networks"]) == ("interrupted", networks)
    assert (part / "table.md").exists() == (part / "results.jsonl").exists() == (networks > 0)
    if networks:
        table = (part / "table.md").read_text()
        assert "| random" in table
        assert f"This evaluation is unfinished: interrupted after {networks} networks." in table


def _copied(source, folder):
    shutil.copytree(source, folder.path, dirs_exist_ok=True)
    return folder.read_genotype()


def test_the_table_of_an_evaluation_is_current_after_each_network(searched, monkeypatch):
    tables = []

    def look(*given, **options):
        table = searched / "evaluation" / "table.md"
        tables.append(table.read_text() if table.exists() else "")
        return retrain(*given, **options)

    monkeypatch.setattr(comparison, "retrain", look)
    assert main(["evaluate", str(searched), *RETRAIN_FLAGS, "--tasks", "digits:0-1"]) == 0
    assert tables[0] == ""
    assert "running, or killed, after 1 networks" in tables[1]
    assert "unfinished" not in (searched / "evaluation" / "table.md").read_text()
    assert json.loads((searched / "evaluation" / "status.json").read_text())["state"] == "complete"


def test_an_interruption_before_there_is_a_folder_claims_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "load", interrupted)
    assert main(["run", "--folder", str(tmp_path / "run")]) == 130
    errors = capsys.readouterr().err
    assert "Nothing was written yet" in errors
    assert "is in" not in errors


def test_an_interruption_while_modules_load_ends_at_once(monkeypatch):
    found = []

    def look(_):
        found.append(signal.getsignal(signal.SIGINT))
        return lambda: found.append(signal.getsignal(signal.SIGINT))

    loading = types.ModuleType("cli")
    loading.__getattr__ = look
    monkeypatch.setitem(sys.modules, "examples.nas_interleaving.cli", loading)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        runpy.run_module("examples.nas_interleaving", run_name="__main__")
    assert found[-2:] == [signal.SIG_DFL, before]


def test_sigterm_does_what_it_did_after_a_command(searched):
    before = signal.getsignal(signal.SIGTERM)
    assert main(["plot", str(searched)]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "svhn"], "unknown task 'svhn'"),
        (["--method", "newton"], "unknown name 'newton'"),
        (["--steps", "0"], "steps = 0: expected an integer of at least 1"),
        (
            ["--batch-size", "5000"],
            "task 'digits:0-1' has 125 images in train; expected at least one batch of batch_size = 5000",
        ),
        (["--method", "neumann:terms=0"], "terms"),
        (["--method", "finite-difference", "neumann"], "two methods for all stages"),
        (["--method", "finite-difference", "--method", "neumann"], "two methods for all stages"),
        (["--warmup", "3"], "warmup = 3, steps = 3: expected warmup to be smaller than steps"),
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


def test_evaluating_what_is_no_search_is_refused(tmp_path, searched, capsys):
    assert main(["evaluate", str(tmp_path / "nothing")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "No such file or directory. Expected the folder of a search." in capsys.readouterr().err
    (searched / "genotype.json").write_text('{"normal": []}')
    assert main(["evaluate", str(searched)]) == 2
    assert "genotype.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_training_data_smaller_than_a_batch_is_refused_before_anything_is_written(command, tmp_path, searched, capsys):
    folder = {"run": ["--folder", str(tmp_path / "run"), *TINY_FLAGS], "evaluate": [str(searched)]}[command]
    assert main([command, *folder, "--retrain-batch-size", "5000"]) == 2
    assert "at least one batch of retrain_batch_size = 5000. Lower retrain_batch_size" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not (searched / "evaluation").exists()


def test_the_same_seed_twice_is_refused(tmp_path, capsys):
    assert main(["run", *TINY_FLAGS, "--seeds", "1", "2", "1", "--folder", str(tmp_path / "run")]) == 2
    assert "seeds: 1 is given twice" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_warm_up_longer_than_the_search_is_refused_where_it_is_the_default(tmp_path, capsys):
    assert main(["search", "--steps", "5", "--folder", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert "warmup = 10, steps = 5" in errors
    assert "Lower warmup, or raise steps." in errors


def test_a_shortened_option_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["search", "--step", "5"])
    assert "unrecognized arguments: --step 5" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/proc/foo", "{file}/below", "{file}"])
def test_a_folder_that_cannot_be_made_is_refused(place, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    folder = place.format(file=tmp_path / "file")
    assert main(["search", *TINY_FLAGS, "--folder", folder]) == 2
    assert folder in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_is_no_search(capsys):
    assert main(["plot", str(ROOT / "README.md")]) == 2
    assert "README.md/config.json cannot be read: Not a directory. Expected the folder" in capsys.readouterr().err
    assert main(["evaluate", str(ROOT / "README.md"), "--tasks", "digits"]) == 2
    assert "README.md': " in capsys.readouterr().err


def test_an_architecture_of_no_search_is_tested_on_the_tasks_that_are_given(tmp_path, searched, capsys):
    flags = [*RETRAIN_FLAGS, "--tasks", "digits:0-1", "--seeds", "3"]
    assert main(["evaluate", str(searched / "genotype.json"), *RETRAIN_FLAGS]) == 2
    assert "tasks: expected those to test on" in capsys.readouterr().err
    for number, where in enumerate(("DARTS_V2", str(searched / "genotype.json"))):
        folder = tmp_path / f"transfer_{number}"
        assert main(["evaluate", where, *flags, "--folder", str(folder)]) == 0
        results = _lines(folder / "results.jsonl")
        assert [(r["architecture"], r["task"], r["seed"]) for r in results] == [
            (name, "digits:0-1", 3) for name in (Path(where).stem, "random")
        ]
        assert json.loads((folder / "status.json").read_text())["state"] == "complete"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "config.json cannot be read: expected a JSON object with settings"),
        ("config.json", '{"settings": 3}', "expected settings by their names, got 3"),
        (
            "config.json",
            '{"settings": {"retrain_cells": 3}}',
            "config.json cannot be read: unknown settings retrain_cells",
        ),
        ("status.json", '{"state": "running"}', "expected a JSON object with state, steps, seconds"),
        ("status.json", "\x00", "status.json cannot be read"),
        ("architecture.jsonl", '{"step": 0}\n', "architecture.jsonl cannot be read: no weights in its last line"),
        ("architecture.jsonl", '{"st\n{}\n', "architecture.jsonl cannot be read: line 1: "),
        ("architecture.jsonl", '{"st', "architecture.jsonl holds no weights: the search ended before it began"),
    ],
)
def test_a_broken_file_is_named(file, content, message, searched, capsys):
    (searched / "genotype.json").unlink()
    (searched / file).write_text(content)
    assert main(["evaluate", str(searched), *RETRAIN_FLAGS]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "search", "evaluate", "compare", "ablate", "plot"])
def test_help_gives_each_default_once_and_in_words(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    defaults = re.findall(r"\(default: (.*?)\)", text)
    assert text.count("default:") == len(defaults)
    assert [d for d in defaults if not d or d == "None" or d.startswith("(")] == []
    assert "PyTorch's own choice" in defaults
    assert ("digits:0-4 digits:5-9" in defaults) == (command not in ("evaluate", "plot"))
    assert "None" not in re.findall(r"\w+", text)


def test_a_wrong_value_is_refused_in_two_lines(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["search", "--steps", "many"])
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage == "usage: python -m examples.nas_interleaving search [OPTION ...]"
    assert error.endswith("argument --steps: invalid int value: 'many'")


def test_the_python_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "examples" / "nas_interleaving" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec", dont_inherit=True), {"__name__": "__main__"})
    folder = tmp_path / "runs" / "stripes"
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["tasks"] == ["across", "along"], "the folder tells of the tasks that were given"
    printed = capsys.readouterr().out
    assert re.search(r"across: [\d.]+ % .*\nalong: [\d.]+ %", printed)
    (folder / "losses.png").unlink()
    assert main(["plot", str(folder)]) == 0
    assert (folder / "losses.png").read_bytes().startswith(PNG)
