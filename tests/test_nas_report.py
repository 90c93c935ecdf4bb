"""What a search is seen by: drawings, animation, report, events for TensorBoard; made from its folder alone."""

from __future__ import annotations

import base64
import re
import shlex
import sys
import types
from html.parser import HTMLParser
from io import BytesIO

import pytest
import torch
from PIL import Image

from examples.nas_interleaving import cli, plots
from examples.nas_interleaving.cli import main
from examples.nas_interleaving.command_options import read_settings
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.drawings.cells import draw_cells
from examples.nas_interleaving.drawings.graph import draw_graph
from examples.nas_interleaving.drawings.heat_maps import animate_heat_maps, draw_heat_maps
from examples.nas_interleaving.drawings.names import edge_names
from examples.nas_interleaving.drawings.signals import draw_signals
from examples.nas_interleaving.drawings.weights import draw_edges, has_edge_weights
from examples.nas_interleaving.genotype import CELL_KINDS, Genotype, edge_count
from examples.nas_interleaving.operations import OPERATION_NAMES
from examples.nas_interleaving.report import write_report
from examples.nas_interleaving.reproduction import command_line
from examples.nas_interleaving.run_folder import RunFolder
from examples.nas_interleaving.search_settings import SearchSettings

TITLES = {"learner_1_round_1": "digits:0-1", "learner_2_round_1": "digits:2-3"}
PICTURES = ("cells.png", "losses.png", "signals.png", "heat_maps.png", "architecture.png", "edges.png", "graph.png")


def weights(steps, nodes, edges=False):
    """Return weights that move from the first to the last operation; edges weigh differently, if asked for."""
    lines = []
    for step in range(steps):
        share = step / max(1, steps - 1)
        line = {"step": step}
        for kind in CELL_KINDS:
            rows = torch.full((edge_count(nodes), len(OPERATION_NAMES)), 0.1 / 8, dtype=torch.float64)
            rows[:, 1] += 0.9 * (1 - share)
            rows[:, -1] += 0.9 * share
            if edges:
                rows *= torch.linspace(0.1, 0.9, len(rows)).unsqueeze(1)
            line[kind] = rows.tolist()
        lines.append(line)
    return lines


def metrics(steps):
    """Return metrics of two learners and the architecture."""
    lines = []
    for step in range(1, steps + 1):
        common = {"step": step, "outcome": "stepped", "gradient_norm": 1.0, "learning_rate": 0.1, "solves": {}}
        validated = {"loss": 1.5 / step, "accuracy": 0.5} if step % 2 == 0 else None
        signs = {"skip_connections": 3.0, "eigenvalue": 0.1 * step} if step % 2 == 0 else None
        lines += [
            common
            | {"problem": "learner_1_round_1", "loss": 1 / step, "metrics": {"fit": 1 / step}}
            | {"validation": validated},
            common
            | {"problem": "learner_2_round_1", "loss": 2 / step, "validation": validated}
            | {"metrics": {"fit": 1 / step, "squared_distance": 4.0 * step**2}},
            common
            | {"problem": "architecture", "loss": 2 / step, "validation": signs}
            | {"metrics": dict.fromkeys(TITLES, 1 / step)},
        ]
    return lines


@pytest.fixture
def folder(tmp_path):
    """The folder of a search with edge weights, as a search would leave it, and of one evaluation."""
    run = RunFolder.create(tmp_path / "run")
    settings = SearchSettings(tasks=tuple(TITLES.values()), rounds=1, steps=6, warmup=1, nodes=2, space="pc-darts")
    run.write_config(settings, DataSettings(augment=False))
    run.write_json("status.json", {"state": "complete", "steps": 6, "seconds": 12.3})
    run.write_text(
        "graph.mmd",
        'flowchart BT\n    p1["learner_1_round_1"]\n    p2["learner_2_round_1"]\n'
        '    p3["architecture"]\n    p3 -.->|constraint| p1\n    p1 -->|response| p2\n    p3 -.->|constraint| p2\n'
        "    p1 -->|response| p3\n    p2 -->|response| p3",
    )
    run.append("architecture.jsonl", *weights(7, 2, edges=True))
    run.append("metrics.jsonl", *metrics(6))
    part = run.new_part("evaluation")
    part.write_text("table.md", "| architecture | digits:0-1 |\n|---|---|\n| <interleaving> | 97.50 |")
    return run


class _Page(HTMLParser):
    """Collects the pictures of a page, its text, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.texts, self.loaded, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("img", "meta"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "src" and value.startswith("data:image/"):
                self.pictures.append(base64.b64decode(value.partition(",")[2]))
            elif name in ("src", "href"):
                self.loaded.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_report_holds_everything_and_needs_no_other_file(folder):
    plots.draw_run(folder)
    write_report(folder)
    page = _Page((folder.path / "report.html").read_text())
    assert page.loaded == page.open == []
    sizes = {Image.open(BytesIO(content)).format for content in page.pictures}
    assert sizes == {"PNG", "GIF"}
    in_folder = {name: (folder.path / name).read_bytes() for name in (*PICTURES, "architecture.gif")}
    assert sorted(page.pictures) == sorted(in_folder.values())
    text = "".join(page.texts)
    markdown = (folder.path / "report.md").read_text()
    for found in (text, markdown):
        assert "python -m examples.nas_interleaving search --tasks digits:0-1 digits:2-3 --rounds 1 --steps 6" in found
        assert "Complete after 6 of 6 steps and 12 seconds." in found
        assert "<interleaving> | 97.50" in found, "text is text, not markup"
        assert "p1 -->|response| p2" in found
        assert torch.__version__ in found
    assert "| proximity | 1.0 |" in markdown
    for name in in_folder:
        assert f"]({name})" in markdown


def test_what_a_run_has_not_is_left_out(folder):
    for name in ("metrics.jsonl", "graph.mmd", "evaluation/table.md"):
        (folder.path / name).unlink()
    plots.draw_run(folder)
    write_report(folder)
    markdown = (folder.path / "report.md").read_text()
    assert re.findall(r"!\[.*\]\((.*)\)", markdown) == [
        "cells.png",
        "heat_maps.png",
        "architecture.gif",
        "architecture.png",
        "edges.png",
    ]
    assert "mermaid" not in markdown
    assert "Test results" not in markdown


def test_an_interrupted_search_and_one_that_was_stopped_say_so(folder):
    stopped = {"reason": "4 skip connections in the normal cell", "architecture_of_step": 3}
    folder.write_json(
        "status.json",
        {
            "state": "interrupted",
            "steps": 4,
            "seconds": 1.0,
            "stopped": stopped,
            "passes": {"forward": 1200, "reverse": 900},
        },
    )
    write_report(folder)
    markdown = (folder.path / "report.md").read_text()
    assert "Interrupted after 4 of 6 steps" in markdown
    assert "1,200 forward, 900 reverse" in markdown
    assert "Stopped early: 4 skip connections in the normal cell; the architecture is that of step 3." in markdown


def test_the_animation_runs_from_the_first_step_to_the_last():
    found = Image.open(BytesIO(animate_heat_maps(weights(50, 2))))
    assert found.format == "GIF"
    assert found.n_frames == 20
    frames = []
    for index in (0, found.n_frames - 1):
        found.seek(index)
        frames.append(torch.frombuffer(bytearray(found.convert("RGB").tobytes()), dtype=torch.uint8))
    assert not torch.equal(*frames)
    assert Image.open(BytesIO(animate_heat_maps(weights(1, 1)))).n_frames == 1


def test_heat_maps_show_the_weights_of_their_steps_and_ring_what_is_decoded():
    lines = weights(10, 2)
    figure = draw_heat_maps(lines)
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in panels] == [
        f"{kind}, step {step}" for kind in CELL_KINDS for step in (0, 3, 6, 9)
    ]
    assert panels[1].images[0].get_array().tolist() == lines[3]["normal"]
    genotype = Genotype.decode({kind: torch.tensor(lines[3][kind]) for kind in CELL_KINDS})
    rings = {(OPERATION_NAMES[round(x)], edge_names(2)[round(y)]) for x, y in panels[1].collections[0].get_offsets()}
    states = ("$c_{k-2}$", "$c_{k-1}$", "0")
    assert rings == {
        (name, f"{states[state]} → {node}") for node, edges in enumerate(genotype.normal) for name, state in edges
    }


def test_edges_are_drawn_where_they_have_weights():
    assert not has_edge_weights(weights(3, 2))
    lines = weights(3, 2, edges=True)
    assert has_edge_weights(lines)
    panel = draw_edges(lines).axes[1]
    assert [line.get_label() for line in panel.lines] == edge_names(2)[2:]
    assert panel.lines[0].get_ydata()[0] == pytest.approx(sum(lines[0]["normal"][2]))


def test_signals_are_drift_skips_and_eigenvalue():
    drift, skips, eigenvalue = draw_signals(metrics(4), TITLES).axes
    (line,) = drift.lines
    assert (line.get_label(), list(line.get_ydata())) == ("digits:2-3", [2.0, 4.0, 6.0, 8.0])
    assert list(skips.lines[0].get_xdata()) == [2, 4]
    assert list(eigenvalue.lines[0].get_ydata()) == pytest.approx([0.2, 0.4])
    first = [line for line in metrics(1) if line["problem"] == "learner_1_round_1"]
    assert draw_signals(first, TITLES) is None


@pytest.mark.parametrize("nodes", [1, 4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_names_in_a_drawing_of_cells_stay_inside_and_off_the_nodes(nodes, seed):
    figure = draw_cells(Genotype.random(nodes, seed))
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = {text: text.get_window_extent() for text in axes.texts}
        names = [text for text in boxes if text.get_text() in OPERATION_NAMES]
        others = [text for text in boxes if text not in names]
        assert len(names) == 2 * nodes
        for name in names:
            assert axes.bbox.fully_containsx(boxes[name].x0)
            assert axes.bbox.y0 <= boxes[name].y0 < boxes[name].y1 <= axes.bbox.y1
            assert not any(boxes[name].overlaps(boxes[other]) for other in others)


def test_the_graph_is_drawn_with_all_its_edges(folder):
    axes = draw_graph(folder.read_text("graph.mmd"), TITLES).axes[0]
    assert {text.get_text() for text in axes.texts} == {*TITLES.values(), "architecture"}
    assert sorted(arrow.get_linestyle() for arrow in axes.patches) == ["-", "-", "-", ":", ":"]


def test_plot_draws_and_reports(folder, capsys):
    assert main(["plot", str(folder.path)]) == 0
    assert {*PICTURES, "architecture.gif", "report.md", "report.html"} <= {f.name for f in folder.path.iterdir()}
    assert not list(folder.path.rglob(".*"))


def test_the_report_of_what_is_no_search_is_refused(folder, capsys):
    (folder.path / "config.json").unlink()
    assert main(["plot", str(folder.path)]) == 2
    assert "config.json cannot be read: No such file or directory. Expected the folder" in capsys.readouterr().err


def test_events_for_tensorboard_hold_every_number(folder, monkeypatch):
    written = {}

    class Writer:
        def __init__(self, place):
            self.place = place

        def __enter__(self):
            return self

        def __exit__(self, *_):
            written["closed"] = self.place

        def add_scalar(self, name, value, step):
            written[name, step] = value

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    assert main(["plot", str(folder.path), "--tensorboard"]) == 0
    assert written["closed"] == str(folder.path / "tensorboard")
    assert written["learner_2_round_1/metrics/squared_distance", 3] == 36.0
    assert written["architecture/validation/skip_connections", 4] == 3.0
    assert written["weights/normal/edge_0/max_pool_3x3", 0] == weights(7, 2, edges=True)[0]["normal"][0][1]


def test_without_the_package_tensorboard_is_refused(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["plot", str(folder.path), "--tensorboard"]) == 2
    assert "Install it (pip install tensorboard)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"tasks": ("digits:0-1", "digits:2-3"), "method": ("neumann:terms=3", "learner_1_round_1=identity")},
        {"shrink_operations": (8, 5), "shrink_cells": (2, 3), "skip_dropout": (0.0, 0.4), "proximity": 0.0},
        {
            "algorithm": "joint",
            "rounds": 1,
            "task_weights": (0.25, 0.75),
            "proximity": 1.0,
            "architecture_learning_rate": 1e-05,
        },
    ],
)
def test_the_command_of_a_report_gives_the_settings_back(changed):
    settings, data = SearchSettings(**changed), DataSettings(augment=False, images_per_class=7, data="a folder")
    words = shlex.split(command_line(settings, data, 2))
    assert words[:4] == ["python", "-m", "examples.nas_interleaving", "search"]
    options = cli._parser().parse_args(words[3:])
    assert read_settings(SearchSettings, options) == settings
    assert read_settings(DataSettings, options) == data
    assert options.threads == 2


def test_the_command_leaves_out_what_the_algorithm_does_not_read():
    command = command_line(SearchSettings(algorithm="joint", rounds=1, proximity=0.5), DataSettings(), 1)
    assert "proximity" not in command


def test_a_search_on_tasks_of_a_script_cannot_be_had_by_a_command(folder):
    folder.write_config(SearchSettings(tasks=("own",), rounds=1))
    write_report(folder)
    assert "made by a script of your own" in (folder.path / "report.md").read_text()
