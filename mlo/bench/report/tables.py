"""The tables, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mlo.bench.records import Record
from mlo.bench.report.selection import Machine, case_of, grouped, in_order, machines

_OURS, _COMPILED, _BY_HAND = "mlo", "mlo-compiled", "by-hand"
# Reverse passes up to which the best errors are compared.
_BUDGETS = (5, 10, 25, 60, 110)
#: An error below is one of rounding, and not compared.
ROUNDING = 1e-9
# Methods of which one pass may be worth many: through the graph of a whole solve, or vectorised over many products.
_LONG_PASSES = ("unroll", "dense")
_MEBI = 2**20

#: A title, the experiment that it shows (`None`: all), and what makes its lines.
Section = tuple[str, str | None, Callable[[Machine], list[str]]]


def tables(records: Sequence[Record]) -> str:
    """Return all tables as one page of Markdown."""
    lines = ["# Results of `python -m mlo.bench`", ""]
    for machine in machines(records):
        lines += [f"## {machine.title}", "", f"Versions: {machine.versions}.", ""]
        for title, experiment, section in _SECTIONS:
            content = section(machine)
            if content:
                lines += [f"### {title}{_threads(machine, experiment)}", "", *content]
    return "\n".join(lines).rstrip() + "\n"


def _threads(machine: Machine, experiment: str | None) -> str:
    if experiment is None:
        return ""
    counts = sorted({r["threads"] for r in machine.of(experiment)})
    return f" ({' and '.join(map(str, counts))} thread{'' if counts == [1] else 's'})"


# --- accuracy ----------------------------------------------------------------------------------------------------


def _same_method(machine: Machine) -> list[str]:
    """Compare each other library with ours, over all cases in which both took the same method."""
    done = [r for r in machine.of("accuracy") if r["failure"] is None]
    ours = {(case_of(r), r["method"], r["dtype"]): r for r in done if r["library"] == _OURS}
    rows = []
    for library in in_order(done, "library"):
        found = [(r, ours.get((case_of(r), r["method"], r["dtype"]))) for r in done if r["library"] == library]
        pairs = [(r, o) for r, o in found if o is not None]
        if library == _OURS or not pairs:
            continue
        counted = [(r, o) for r, o in pairs if _comparable(r) and _comparable(o)]
        rows.append(
            [
                f"{library} {pairs[0][0]['version']}",
                str(len(pairs)),
                _mean_ratio([(r["seconds"]["median"], o["seconds"]["median"]) for r, o in pairs]),
                _mean_ratio([(r["reverse_passes"], o["reverse_passes"]) for r, o in counted]),
                str(sum(_worse(r["error"], o["error"]) for r, o in pairs)),
                str(sum(_worse(o["error"], r["error"]) for r, o in pairs)),
            ]
        )
    if not rows:
        return []
    return [
        "All cases in which both took the same method: geometric means of the ratios of times and (but for `dense` and "
        "`unroll`) of reverse passes, above 1 where `mlo` takes less; and how often one has an error more than twice "
        f"the other's that is not rounding (above {ROUNDING:.0e}).",
        "",
        *_table(["library", "cases", "time / mlo's", "passes / mlo's", "it is less accurate", "mlo is"], rows),
    ]


def _comparable(record: Record) -> bool:
    """Return whether the number of reverse passes says what they cost."""
    return bool(record["reverse_passes"]) and record["method"].split(":")[0] not in _LONG_PASSES


def _worse(error: float, than: float) -> bool:
    return error > max(2 * than, ROUNDING)


def _mean_ratio(pairs: Sequence[tuple[float, float]]) -> str:
    if not pairs:
        return "–"
    return f"{math.exp(sum(math.log(a / b) for a, b in pairs) / len(pairs)):.2f}"


def _best(machine: Machine) -> list[str]:
    """Compare the best errors within budgets of reverse passes."""
    done = [r for r in machine.of("accuracy") if r["failure"] is None and _comparable(r)]
    rows = []
    for case, records in grouped(done, case_of).items():
        cells = [case]
        for budget in _BUDGETS:
            within = [r for r in records if r["reverse_passes"] <= budget]
            ours = min((r for r in within if r["library"] == _OURS), key=_error, default=None)
            peer = min(
                (r for r in within if r["library"] not in (_OURS, _COMPILED, _BY_HAND)), key=_error, default=None
            )
            cells.append(f"{_best_cell(ours, False)} · {_best_cell(peer, True)}")
        rows.append(cells)
    if not any("–" not in cell for row in rows for cell in row[1:]):
        return []
    return [
        "The least error within a number of reverse passes: `mlo`'s · the best peer's. Left out are libraries whose "
        "passes cannot be counted, and `dense` and `unroll`, of which one pass may be worth many.",
        "",
        *_table(["problem", *(f"≤ {budget} passes" for budget in _BUDGETS)], rows),
    ]


def _error(record: Record) -> float:
    return float(record["error"])


def _best_cell(record: Record | None, named: bool) -> str:
    if record is None:
        return "–"
    return f"{_number(record['error'])} ({record['library'] + ' ' if named else ''}{record['method']})"


def _accuracy(machine: Machine) -> list[str]:
    """Return a table for each problem."""
    lines = []
    for (case, dtype), records in grouped(machine.of("accuracy"), lambda r: (case_of(r), r["dtype"])).items():
        done = [r for r in records if r["failure"] is None]
        rows = []
        for method, group in grouped(done, lambda r: r["method"]).items():
            ours = next((r for r in group if r["library"] == _OURS), None)
            rows += [[f"`{method}`", *_accuracy_cells(r, ours)] for r in group]
        if rows:
            header = ["method", "library", "error", "passes", "ms [quartiles]", "time / mlo's", "peak MiB"]
            lines += [f"**{case}** ({dtype})", "", *_table(header, rows)]
    return lines


def _accuracy_cells(record: Record, ours: Record | None) -> list[str]:
    seconds = record["seconds"]
    ratio = "" if ours is None else f"{seconds['median'] / ours['seconds']['median']:.2f}"
    return [
        record["library"],
        _number(record["error"]),
        _count(record["reverse_passes"]),
        _milliseconds(seconds),
        ratio,
        _mebibytes(record["memory_bytes"]),
    ]


# --- the other experiments ---------------------------------------------------------------------------------------


def _chains(machine: Machine) -> list[str]:
    lines = []
    every = machine.of("chains")
    titles = grouped(every, lambda r: (r["problem"], r.get("topology"), r["method"]))
    for (problem, topology, method), records in titles.items():
        libraries = in_order(records, "library")
        rows = []
        for stages, group in sorted(grouped(records, lambda r: r["stages"]).items()):
            by_library = {r["library"]: r for r in group}
            ours = by_library.get(_OURS)
            cells = [str(stages)]
            for library in libraries:
                record = by_library.get(library)
                cells += _chain_cells(record, ours, library)
            rows.append(cells)
        header = ["stages"]
        for library in libraries:
            header += [f"{library}: passes", "ms"] + ([] if library == _OURS else ["time / mlo's"])
        lines += [f"**{problem}, {topology}, `{method}`**", "", *_table(header, rows)]
        lines += [_differences(records, libraries), ""]
    return lines


def _differences(records: Sequence[Record], libraries: Sequence[str]) -> str:
    """Return how far each library's results are from the hand-written sweep's."""
    shown = []
    for library in libraries:
        found = [r["difference"] for r in records if r["library"] == library and r.get("difference") is not None]
        if library != _BY_HAND and found:
            shown.append(f"{library} {_number(max(found))}")
    return f"Largest difference from the hand-written sweep: {', '.join(shown) or 'not measured'}."


def _chain_cells(record: Record | None, ours: Record | None, library: str) -> list[str]:
    width = 2 if library == _OURS else 3
    if record is None or record["seconds"] is None:
        return ["–"] * width
    cells = [_count(record["reverse_passes"]), _short(1e3 * record["seconds"]["median"])]
    if library == _OURS:
        return cells
    reference = None if ours is None or ours["seconds"] is None else ours["seconds"]["median"]
    return [*cells, "–" if reference is None else _short(record["seconds"]["median"] / reference)]


def _overhead(machine: Machine) -> list[str]:
    done = [r for r in machine.of("overhead") if r["failure"] is None]
    if not done:
        return []
    peaks = {_overhead_case(r): r["memory_bytes"] for r in done if r["library"] == _BY_HAND}
    rows = []
    for record in done:
        peak, reference = record["memory_bytes"], peaks.get(_overhead_case(record))
        known = peak is not None and reference is not None
        again = record["library"] == _BY_HAND
        rows.append(
            [
                case_of(record),
                f"`{record['method']}`",
                record["library"],
                _milliseconds(record["seconds"]),
                _ratio(record["raw_ratio"] if again else record["ratio"]),
                str(record["ratio"]["pairs"]),
                _count(record["reverse_passes"]),
                _mebibytes(peak),
                f"{(peak - reference) / record['state_bytes']:+.2f}" if known else "–",
                _number(record["difference"]),
            ]
        )
    header = ["case", "method", "library", "ms [quartiles]", "time / by hand [95 %]", "pairs", "passes", "peak MiB"]
    return [
        "One outer step. The ratio is the median over alternating pairs with its bootstrap interval; in the row of the "
        "hand-written loop it is that of a second copy of the same loop to the first. Extra copies: the peak above the "
        "hand-written loop's, in units of all parameters and buffers. Difference: of the hypergradient at the start, "
        "relative to the hand-written one.",
        "",
        *_table([*header, "extra copies", "difference"], rows),
    ]


def _overhead_case(record: Record) -> tuple[str, str]:
    return case_of(record), record["method"]


def _memory(machine: Machine) -> list[str]:
    done = [r for r in machine.of("memory") if r["failure"] is None]
    steps = {case_of(r): r["memory_bytes"] for r in done if r["method"] == "training step"}
    rows = []
    for record in done:
        peak, step = record["memory_bytes"], steps.get(case_of(record))
        known = peak is not None and step is not None
        rows.append(
            [
                case_of(record),
                record["method"] + (f", {record['variant']}" if record.get("variant") else ""),
                record["library"],
                _mebibytes(peak),
                f"{(peak - step) / record['state_bytes']:+.2f}" if known else "–",
                _mebibytes(record["state_bytes"]),
            ]
        )
    if not rows:
        return []
    header = ["case", "method", "library", "peak MiB", "above a training step, in copies", "one copy, MiB"]
    return [
        "Peak of one hypergradient (of a whole step where the method unrolls) above what was allocated before it. A "
        "copy is one of all parameters and buffers.",
        "",
        *_table(header, rows),
    ]


def _convergence(machine: Machine) -> list[str]:
    done = [r for r in machine.of("convergence") if r["failure"] is None]
    rows = [
        [
            case_of(r),
            f"`{r['method']}`",
            r["library"],
            str(len(r["objective"]) - 1),
            _objective(r["objective"][0]),
            _objective(r["objective"][-1]),
            _short(r["training_seconds"]),
        ]
        for r in done
    ]
    header = ["problem", "method", "library", "outer steps", "objective at first", "at last", "seconds"]
    return _table(header, rows) if rows else []


def _missing(machine: Machine) -> list[str]:
    """Return what was not measured, the same reasons put together."""
    failed = [r for r in machine.records if r["failure"] is not None]
    rows = []
    for (experiment, library, reason), group in grouped(
        failed, lambda r: (r["experiment"], r["library"] or "–", r["failure"])
    ).items():
        cases = [f"{case_of(r)}{': ' + r['method'] if r['method'] else ''}" for r in group]
        shown = cases[0] if len(cases) == 1 else f"{cases[0]} and {len(cases) - 1} more"
        rows.append([experiment, library, shown, reason.replace("|", "\\|")])
    return _table(["experiment", "library", "case", "reason"], rows) if rows else []


_SECTIONS: tuple[Section, ...] = (
    ("The same method", "accuracy", _same_method),
    ("The best error for a number of reverse passes", "accuracy", _best),
    ("Overhead of a step", "overhead", _overhead),
    ("Chains of stages", "chains", _chains),
    ("Memory", "memory", _memory),
    ("Convergence", "convergence", _convergence),
    ("Accuracy and cost, problem by problem", "accuracy", _accuracy),
    ("Not measured", None, _missing),
)


# --- cells -------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [_line(header), _line(["---"] * len(header)), *map(_line, rows)]
    return [*lines, ""]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _short(value: float) -> str:
    """Return a number with three digits.

    >>> _short(1234.5), _short(12.345), _short(0.012345)
    ('1,234', '12.3', '0.0123')

    """
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _objective(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _milliseconds(seconds: Any) -> str:
    median, low, high = (_short(1e3 * seconds[key]) for key in ("median", "low", "high"))
    return f"{median} [{low}–{high}]"


def _ratio(ratio: Any) -> str:
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}–{ratio['high']:.3f}]"


def _mebibytes(count: float | None) -> str:
    return "–" if count is None else f"{count / _MEBI:.2f}"
