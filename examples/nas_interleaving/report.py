"""The report of a run: all that its folder holds on one page, as Markdown and as HTML that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from examples.nas_interleaving import plots
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.reproduction import command_line
from examples.nas_interleaving.run_folder import CONFIG, TABLE, RunFolder
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.status import COMPLETE, describe

REPORT_MD = "report.md"
REPORT_HTML = "report.html"

_EVALUATIONS = "evaluation*"

_PICTURES = {
    plots.CELLS_PNG: ("The architecture found", "Both cells; what a node reads stands at its incoming edges."),
    plots.LOSSES_PNG: ("Losses", "Of each stage by round and learner, and of the architecture."),
    plots.SIGNALS_PNG: (
        "Drift and signs of collapse",
        "How far each encoder is from that of the learner before; skip connections in the normal cell; the largest "
        "eigenvalue of the Hessian of the validation loss in the architecture.",
    ),
    plots.HEAT_MAPS_PNG: (
        "Architecture weights",
        "Edges by operations at some steps; what would be decoded there has a red ring.",
    ),
    plots.HEAT_MAPS_GIF: ("Architecture weights over the steps", "The same, as they move."),
    plots.WEIGHTS_PNG: ("Architecture weights by edge", "A panel for each edge, a line for each operation."),
    plots.EDGES_PNG: ("Weights of the edges", "The softmax of β over the edges into each node (PC-DARTS)."),
    plots.GRAPH_PNG: (
        "The problem graph",
        "Solid: a response, through which hypergradients flow. Dotted: a value that is given.",
    ),
}

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border: 1px solid #ccc; padding: 0.2rem 0.6rem; text-align: left; vertical-align: top; }
pre { background: #f4f4f4; padding: 0.8rem; overflow-x: auto; }
figcaption { color: #555; }
figure { margin: 0; }
</style>
</head>
<body>
$body
</body>
</html>
""")


def write_report(folder: RunFolder) -> None:
    """Draw what only a report shows, and write `report.md` and `report.html`.

    Both have the state of the search, its settings, versions and command, the test results of its evaluations, all
    drawings and the problem graph. What a run has not (yet) is left out.

    Raises:
        RunFolderError: it is not the folder of a search, or cannot be written.

    """
    plots.draw_for_report(folder)
    parts = _parts(folder)
    folder.write_text(REPORT_MD, "\n\n".join(part.markdown() for part in parts))
    body = "\n".join(part.html(folder) for part in parts)
    folder.write_text(REPORT_HTML, _PAGE.substitute(title=escape(f"Search in {folder.path.name}"), body=body))


class _Text:
    """A heading with a paragraph, or either of them."""

    def __init__(self, heading: str, text: str = "", level: int = 2) -> None:
        self._heading, self._text, self._level = heading, text, level

    def markdown(self) -> str:
        return "\n\n".join(filter(None, [f"{'#' * self._level} {self._heading}", self._text]))

    def html(self, _: RunFolder) -> str:
        heading = f"<h{self._level}>{escape(self._heading)}</h{self._level}>"
        return heading + (f"\n<p>{escape(self._text)}</p>" if self._text else "")


class _Code:
    """Preformatted text in a language."""

    def __init__(self, language: str, text: str) -> None:
        self._language, self._text = language, text.rstrip("\n")

    def markdown(self) -> str:
        return f"```{self._language}\n{self._text}\n```"

    def html(self, _: RunFolder) -> str:
        return f"<pre>{escape(self._text)}</pre>"


class _Table:
    """A table whose first row is its heading."""

    def __init__(self, rows: Sequence[Sequence[str]]) -> None:
        self._rows = rows

    def markdown(self) -> str:
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self._rows]
        return "\n".join([lines[0], "|" + " --- |" * len(self._rows[0]), *lines[1:]])

    def html(self, _: RunFolder) -> str:
        def line(row: Sequence[str], kind: str) -> str:
            return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row) + "</tr>"

        return "\n".join(["<table>", line(self._rows[0], "th"), *(line(r, "td") for r in self._rows[1:]), "</table>"])


class _Picture:
    """A file of the folder with its caption; the HTML page holds the picture itself."""

    def __init__(self, name: str, caption: str) -> None:
        self._name, self._caption = name, caption

    def markdown(self) -> str:
        return f"![{self._caption}]({self._name})\n\n{self._caption}"

    def html(self, folder: RunFolder) -> str:
        kind = Path(self._name).suffix.removeprefix(".")
        content = base64.b64encode(folder.read_bytes(self._name)).decode("ascii")
        caption = escape(self._caption)
        image = f'<img src="data:image/{kind};base64,{content}" alt="{caption}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


_Part = _Text | _Code | _Table | _Picture


def _parts(folder: RunFolder) -> list[_Part]:
    config, settings, status = folder.read_json(CONFIG), folder.read_search_settings(), folder.read_status()
    parts: list[_Part] = [
        _Text(f"Search: {settings.algorithm} on {', '.join(settings.tasks)}", _state(status, settings), level=1),
        *_again(config, settings),
        *_results(folder),
    ]
    for name, (heading, caption) in _PICTURES.items():
        if folder.has(name):
            parts += [_Text(heading), _Picture(name, caption)]
    if folder.has(plots.GRAPH):
        parts.append(_Code("mermaid", folder.read_text(plots.GRAPH)))
    parts += [_Text("Settings"), _Table([["setting", "value"], *_rows(asdict(settings))])]
    if "data" in config:
        parts += [_Text("Data"), _Table([["setting", "value"], *_rows(config["data"])])]
    versions = {**config["versions"], "threads": config["threads"]}
    return [*parts, _Text("Versions"), _Table([["of", "is"], *_rows(versions)])]


def _again(config: Mapping[str, Any], settings: SearchSettings) -> list[_Part]:
    heading = "To search again"
    if "data" not in config:
        return [_Text(heading, "The tasks were made by a script of your own; run it again, with the settings below.")]
    command = command_line(settings, DataSettings.from_dict(config["data"]), config["threads"])
    return [_Text(heading), _Code("sh", command)]


def _state(status: Mapping[str, Any], settings: SearchSettings) -> str:
    state = status["state"] if status["state"] == COMPLETE else describe(status["state"])
    steps = max(1, len(settings.shrink_operations)) * settings.steps  # in all phases
    text = f"{state.capitalize()} after {status['steps']} of {steps} steps and {status['seconds']:.0f} seconds."
    if "passes" in status:
        passes = status["passes"]
        text += f" Passes through the networks: {passes['forward']:,} forward, {passes['reverse']:,} reverse."
    if "stopped" in status:
        stopped = status["stopped"]
        text += (
            f" Stopped early: {stopped['reason']}; the architecture is that of step {stopped['architecture_of_step']}."
        )
    return text


def _results(folder: RunFolder) -> list[_Part]:
    found: list[_Part] = []
    for part in sorted(folder.path.glob(_EVALUATIONS)):
        evaluation = RunFolder(part)
        if evaluation.has(TABLE):
            found += [_Text(f"Test results ({part.name})"), _Code("text", evaluation.read_text(TABLE))]
    return found


def _rows(values: Mapping[str, Any]) -> list[list[str]]:
    return [[name, " ".join(map(str, v)) if isinstance(v, tuple | list) else str(v)] for name, v in values.items()]
