"""The commands `list`, `run` and `report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mlo.bench.experiments import EXPERIMENTS, SUMMARIES
from mlo.bench.experiments.settings import DTYPES, Settings, Task
from mlo.bench.libraries import LIBRARIES
from mlo.bench.problems import FAMILIES
from mlo.bench.problems.data import FASHION_FOLDER
from mlo.bench.records import append, read
from mlo.bench.report import write_report
from mlo.bench.runner import Interrupted, run
from mlo.bench.specification import KINDS, Method
from mlo.errors import ConfigurationError

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for what cannot be done, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
    except ConfigurationError as error:
        print(f"mlo.bench: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlo.bench",
        description="Compare hypergradient approximations by error, time, reverse passes and memory.",
    )
    commands = parser.add_subparsers(required=True, metavar="list|run|report")

    listing = commands.add_parser("list", help="show experiments, problems, methods and libraries")
    listing.set_defaults(command=_list)

    running = commands.add_parser("run", help="measure, and keep each result as one line of JSON")
    running.set_defaults(command=_run)
    running.add_argument("--output", type=Path, default=Path("bench.jsonl"), help="file that records are added to")
    running.add_argument("--quick", action="store_true", help="less of everything: under two minutes")
    choices = (
        ("experiments", EXPERIMENTS, "experiments"),
        ("problems", FAMILIES, "problems"),
        ("libraries", LIBRARIES, "libraries"),
    )
    for name, known, what in choices:
        running.add_argument(f"--{name}", type=_names(name, known), default=tuple(known), help=f"{what}; default: all")
    running.add_argument("--sizes", type=_words, help="sizes of problems, e.g. breast-cancer,dense-12; default: some")
    running.add_argument("--methods", type=_methods, help="methods with budgets, e.g. fd,cg:20; default: some")
    running.add_argument("--seeds", type=_counts, default=(0,), help="of the problems' data, e.g. 0,1,2; default: 0")
    running.add_argument("--threads", type=_positive, help="of torch; default: 2 for overhead, 1 else")
    running.add_argument("--repetitions", type=_positive, help="timed runs of each case; default: 3 to 100")
    running.add_argument(
        "--seconds", type=float, help="for the timed runs of one library on one case; default: 1, quick 0.3"
    )
    running.add_argument(
        "--time-limit",
        type=float,
        default=60.0,
        help="seconds that one call may take by the growth so far; default: 60",
    )
    running.add_argument("--device", type=_device, default="cpu", help="e.g. cuda; default: cpu")
    running.add_argument("--dtype", choices=tuple(DTYPES), help="default: float64 for accuracy, float32 else")
    running.add_argument(
        "--data", type=Path, default=FASHION_FOLDER, help=f"folder of Fashion-MNIST's files; default: {FASHION_FOLDER}"
    )

    reporting = commands.add_parser("report", help="make tables and plots from records")
    reporting.set_defaults(command=_report)
    reporting.add_argument("records", type=Path, nargs="+", help="files that `run` has written")
    reporting.add_argument("--output", type=Path, default=Path("bench-report"), help="folder for the tables and plots")
    reporting.add_argument("--no-plots", action="store_true", help="tables only (plots need matplotlib)")
    return parser


# --- the commands ------------------------------------------------------------------------------------------------


def _list(_: argparse.Namespace) -> int:
    sections = {
        "experiments": SUMMARIES,
        "problems": {name: f"{f.summary}; sizes {_shortened(f.sizes)}" for name, f in FAMILIES.items()},
        "methods": {name if name in _PLAIN else f"{name}:N": text for name, text in KINDS.items()},
        "libraries": {name: library.unavailable() or library.version() for name, library in LIBRARIES.items()},
    }
    for title, lines in sections.items():
        width = max(map(len, lines))
        print(title)
        for name, text in lines.items():
            print(f"  {name.ljust(width)}  {text}")
    return 0


_PLAIN = tuple(name for name in KINDS if name in ("fd", "identity", "dense"))
_SHOWN_SIZES = 6


def _shortened(sizes: Sequence[str]) -> str:
    if len(sizes) <= _SHOWN_SIZES:
        return ", ".join(sizes)
    return f"{', '.join(sizes[:3])} … {sizes[-1]} ({len(sizes)})"


def _run(options: argparse.Namespace) -> int:
    settings = Settings(
        families={name: FAMILIES[name] for name in options.problems},
        libraries=tuple(LIBRARIES[name] for name in options.libraries),
        sizes=options.sizes,
        methods=options.methods,
        seeds=options.seeds,
        threads=options.threads,
        repetitions=options.repetitions,
        seconds=options.seconds if options.seconds is not None else 0.3 if options.quick else 1.0,
        time_limit=options.time_limit if not options.quick else min(options.time_limit, 5.0),
        device=options.device,
        dtype=options.dtype,
        data=options.data,
        quick=options.quick,
    )
    tasks = [task for name in options.experiments for task in EXPERIMENTS[name](settings)]
    if not tasks:
        raise ConfigurationError(
            "run: expected a selection with something to run; none of the experiments "
            f"{', '.join(options.experiments)} has these problems, sizes and methods. See `python -m mlo.bench list`."
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    count = failures = 0
    try:
        for record in run(_shown(tasks), settings):
            append(options.output, record)
            count, failures = count + 1, failures + (record["failure"] is not None)
    except Interrupted:
        print(f"\nstopped; {count} records are kept in {options.output}", file=sys.stderr)
        return _INTERRUPTED
    print(f"{count} records in {options.output}, of which {failures} say why something was not measured")
    print(f"next: python -m mlo.bench report {options.output}")
    return 0


def _report(options: argparse.Namespace) -> int:
    for path in write_report(read(options.records), options.output, plots=not options.no_plots):
        print(path)
    return 0


def _shown(tasks: list[Task]) -> Iterator[Task]:
    """Go through tasks with a progress bar, or a line for each where tqdm is missing or nobody watches."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm  # noqa: PLC0415 - an extra
        except ImportError:
            pass
        else:
            with tqdm(total=len(tasks)) as bar:
                for task in tasks:
                    bar.set_description(task.title)
                    yield task
                    bar.update()
            return
    for number, task in enumerate(tasks, 1):
        print(f"[{number}/{len(tasks)}] {task.title}", file=sys.stderr, flush=True)
        yield task


# --- values of options -------------------------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _names(option: str, known: Mapping[str, Any]) -> Any:
    def parsed(text: str) -> tuple[str, ...]:
        unknown = [word for word in _words(text) if word not in known]
        if unknown or not _words(text):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, joined by commas; got {text!r}")
        return tuple(name for name in known if name in _words(text))

    parsed.__name__ = option
    return parsed


def _methods(text: str) -> tuple[Method, ...]:
    try:
        return tuple(map(Method.parse, _words(text)))
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(int, _words(text)))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; got {text!r}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a device that torch can use here; got {text!r} ({error})"
        ) from error
    return device
