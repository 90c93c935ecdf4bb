"""The plots, as PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlo.bench.records import Record
from mlo.bench.report.selection import Machine, case_of, grouped, in_order, machines
from mlo.errors import ConfigurationError

_COLUMNS = 3
_WIDTH, _HEIGHT, _LEGEND, _DPI = 5.2, 4.0, 0.4, 100
# The same library has the same colour and marker in all plots.
_STYLES = {
    "mlo": ("#0b5394", "o"),
    "mlo-compiled": ("#3d85c6", "*"),
    "by-hand": ("#666666", "x"),
    "betty": ("#cc0000", "s"),
    "torchopt": ("#e69138", "^"),
    "higher": ("#6aa84f", "v"),
    "boat": ("#674ea7", "D"),
    "jaxopt": ("#a64d79", "P"),
}
_FLOOR = 1e-16
_STAGES = (2, 4, 8, 16, 32, 64)


def write_plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write one file per kind of plot and machine, and return those for which there is something to show.

    Raises:
        ConfigurationError: matplotlib is missing.

    """
    kinds: tuple[tuple[str, Callable[[Machine], Any]], ...] = (
        ("error_against_time", lambda m: _errors(m, "time of one hypergradient, ms", _milliseconds)),
        ("error_against_passes", lambda m: _errors(m, "reverse passes", lambda r: r["reverse_passes"])),
        ("error_against_memory", lambda m: _errors(m, "peak memory, MiB", _mebibytes)),
        ("time_against_stages", _stages),
        ("outer_objective", _objectives),
    )
    written = []
    for number, machine in enumerate(machines(records)):
        for name, draw in kinds:
            figure = draw(machine)
            if figure is not None:
                path = folder / (f"{name}.png" if number == 0 else f"{name}_{number + 1}.png")
                figure.savefig(path, dpi=_DPI, metadata={"Software": None})
                written.append(path)
    return written


def _milliseconds(record: Record) -> float | None:
    return None if record["seconds"] is None else 1e3 * float(record["seconds"]["median"])


def _mebibytes(record: Record) -> float | None:
    return None if not record["memory_bytes"] else float(record["memory_bytes"]) / 2**20


def _errors(machine: Machine, label: str, cost: Callable[[Record], float | None]) -> Any:
    """Draw error against a cost, a panel for each problem, a point for each method of each library."""
    done = [r for r in machine.of("accuracy") if r["failure"] is None and cost(r)]
    panels = grouped(done, case_of)

    def draw(axes: Any, case: str) -> None:
        for library, records in grouped(panels[case], lambda r: r["library"]).items():
            for kind, points in grouped(records, lambda r: r["method"].split(":")[0]).items():
                colour, marker = _STYLES.get(library, ("black", "."))
                costs, errors = [cost(r) for r in points], [max(r["error"], _FLOOR) for r in points]
                line = "-" if len(points) > 1 else ""
                axes.plot(costs, errors, line, color=colour, marker=marker, markersize=4, linewidth=0.8, alpha=0.8)
                if library == "mlo":
                    axes.annotate(kind, (costs[-1], errors[-1]), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.set(xscale="log", yscale="log", title=case, xlabel=label, ylabel="relative error")

    return _figure(list(panels), draw, in_order(done, "library"))


def _stages(machine: Machine) -> Any:
    done = [r for r in machine.of("chains") if r["failure"] is None]
    panels = grouped(done, lambda r: f"{r['problem']}, {r['topology']}, {r['method']}")

    def draw(axes: Any, panel: str) -> None:
        for library, records in grouped(panels[panel], lambda r: r["library"]).items():
            points = sorted((r["stages"], _milliseconds(r)) for r in records)
            colour, marker = _STYLES.get(library, ("black", "."))
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=panel, xlabel="stages", ylabel="time of one hypergradient, ms")
        axes.set_xticks(_STAGES, map(str, _STAGES))
        axes.minorticks_off()

    return _figure(list(panels), draw, in_order(done, "library"))


def _objectives(machine: Machine) -> Any:
    """Draw the outer objective over outer steps: a colour for each method, ours as lines, others as dots."""
    done = [r for r in machine.of("convergence") if r["failure"] is None]
    panels = grouped(done, case_of)

    def draw(axes: Any, case: str) -> None:
        for i, (method, records) in enumerate(grouped(panels[case], lambda r: r["method"]).items()):
            for record in records:
                values = [math.nan if v is None else v for v in record["objective"]]
                if record["library"] == "mlo":
                    axes.plot(values, color=f"C{i}", linewidth=1.2, label=method)
                else:
                    _, marker = _STYLES.get(record["library"], ("black", "."))
                    every = max(1, len(values) // 10)
                    axes.plot(values, color=f"C{i}", marker=marker, markersize=3, markevery=every, linestyle="")
        axes.set(title=case, xlabel="outer steps", ylabel="outer objective")
        axes.legend(fontsize=7)

    return _figure(list(panels), draw, in_order(done, "library"))


def _figure(panels: Sequence[str], draw: Callable[[Any, str], None], libraries: Sequence[str]) -> Any:
    """Return a figure with one panel each and a legend of the libraries; `None` without panels."""
    if not panels:
        return None
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
        from matplotlib.lines import Line2D  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError(
            f"report: expected matplotlib for the plots, which is not installed ({error}). Install it with "
            '`pip install "mlo-torch[bench]"`, or give --no-plots.'
        ) from error
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = _WIDTH * columns, _HEIGHT * rows + _LEGEND
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(rows, columns, squeeze=False)
    # Fixed margins in inches: a layout that is computed draws everything several times.
    figure.subplots_adjust(0.75 / width, 0.55 / height, 1 - 0.15 / width, 1 - (_LEGEND + 0.35) / height, 0.22, 0.28)
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw(axes, panel)
        axes.grid(visible=True, linewidth=0.3)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    handles = []
    for library in libraries:
        colour, marker = _STYLES.get(library, ("black", "."))
        handles.append(Line2D([], [], color=colour, marker=marker, label=library))
    figure.legend(handles=handles, loc="upper center", ncols=min(len(handles), 3 * columns), fontsize=8)
    return figure
