"""The command line."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path

import torch

import mlo
from examples.nas_interleaving.comparison import (
    INTERLEAVING,
    Candidate,
    by_darts,
    drawn_at_random,
    evaluate,
    interleaved,
    summarise,
)
from examples.nas_interleaving.interleaving import build_engine
from examples.nas_interleaving.plots import draw_run
from examples.nas_interleaving.run_folder import RunFolder, RunFolderError
from examples.nas_interleaving.search import search
from examples.nas_interleaving.settings import Kind, RetrainSettings, SearchSettings, Settings, SettingsError
from examples.nas_interleaving.tasks import TaskError, load_tasks

_COMMAND = "python -m examples.nas_interleaving"
_INTERRUPTED = 130
_REFUSED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 2 for what cannot be done as asked, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "run")
    options = _parser().parse_args(given)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    _show_each_warning_once()
    try:
        options.command(options)
    except (SettingsError, TaskError, RunFolderError, mlo.ConfigurationError) as error:
        print(f"{_COMMAND}: {error}", file=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt:
        print(f"\nInterrupted. What is done so far is in {options.folder}.", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_COMMAND,
        description="Interleaving NAS (arXiv 2103.07018): K learners over M rounds search one architecture. "
        "Without a command: run.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "search, retrain, test, and compare with a random architecture")
    _add_folder(run)
    run.add_argument("--compare", action="store_true", help="also compare with plain DARTS on each task, over --seeds")
    run.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="seeds (default: --seed; with --compare: --seed and two more)"
    )
    _add_settings(run, SearchSettings)
    _add_settings(run, RetrainSettings)

    only_search = _command(commands, "search", _search, "search an architecture")
    _add_folder(only_search)
    _add_settings(only_search, SearchSettings)

    retrain = _command(
        commands, "evaluate", _evaluate, "retrain the architecture of a search from scratch, and test it"
    )
    retrain.add_argument("folder", type=Path, help="folder of a search")
    retrain.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks (default: those of the search)")
    retrain.add_argument("--seeds", type=int, nargs="+", metavar="N", help="seeds (default: that of the search)")
    _add_settings(retrain, RetrainSettings)

    plot = _command(commands, "plot", _plot, "draw the pictures of a search again from its folder")
    plot.add_argument("folder", type=Path, help="folder of a search")
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, description=text.capitalize() + ".", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(command=run)
    parser.add_argument("--threads", type=_positive, help="threads of PyTorch (None: its own choice)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return value


def _add_folder(parser: argparse.ArgumentParser) -> None:
    default = Path("runs") / f"nas_{datetime.now():%Y%m%d_%H%M%S}"
    parser.add_argument("--folder", type=Path, default=default, help="new folder for everything that the run leaves")


def _add_settings(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    group = parser.add_argument_group((kind.__doc__ or "").partition("\n")[0].rstrip("."))
    for f in fields(kind):
        several = isinstance(f.default, tuple)
        group.add_argument(
            "--" + f.name.replace("_", "-"),
            dest=f.name,
            type=str if several else type(f.default),
            nargs="+" if several else None,
            default=f.default,
            metavar=f.name.upper() if not several else f.name.rstrip("s").upper(),
            help=f.metadata["help"].replace("%", "%%"),
        )


def _settings(kind: type[Kind], options: argparse.Namespace) -> Kind:
    return kind.from_dict({f.name: getattr(options, f.name) for f in fields(kind)})


def _show_each_warning_once() -> None:
    """Show each warning once: a search of a thousand steps must not repeat it."""
    warnings.simplefilter("once", mlo.MloWarning)


def _search(options: argparse.Namespace) -> None:
    settings = _settings(SearchSettings, options)
    tasks = load_tasks(settings.tasks)
    engine = build_engine(
        tasks, settings
    )  # before anything is left on disk, so that settings that do not fit leave nothing
    folder = RunFolder.create(options.folder)
    print(engine.graph)
    search(folder, tasks, settings)
    print(f"The search is in {folder.path}; go on with: {_COMMAND} evaluate {folder.path}")


def _evaluate(options: argparse.Namespace) -> None:
    folder = RunFolder(options.folder)
    settings = _settings(RetrainSettings, options)
    searched, genotype, status = folder.read_search_settings(), folder.read_genotype(), folder.read_status()
    if status["state"] != "complete":
        print(f"Note: this search is {status['state']} after {status['steps']} steps.", file=sys.stderr)
    tasks = load_tasks(options.tasks or searched.tasks)
    part = folder.new_part("evaluation")
    part.write_config(settings)
    for seed in options.seeds or [searched.seed]:
        evaluate(part, Candidate(INTERLEAVING, genotype, status["seconds"]), tasks, settings, seed)
        evaluate(part, drawn_at_random(replace(searched, seed=seed)), tasks, settings, seed)
    print(summarise(part))


def _run(options: argparse.Namespace) -> None:
    searching, retraining = _settings(SearchSettings, options), _settings(RetrainSettings, options)
    seeds = options.seeds or [searching.seed + i for i in range(3 if options.compare else 1)]
    tasks = load_tasks(searching.tasks)
    print(build_engine(tasks, searching).graph)
    folder = RunFolder.create(options.folder)
    part = folder.new_part("evaluation")
    part.write_config(retraining)
    single = len(seeds) == 1 and not options.compare
    for seed in seeds:
        settings = replace(searching, seed=seed)
        place = folder if single else folder.new_part(f"seed_{seed}")
        candidates = [
            interleaved(place if single else place.new_part("interleaving"), tasks, settings),
            drawn_at_random(settings),
        ]
        if options.compare:
            candidates += [by_darts(place.new_part("darts"), task, settings) for task in tasks]
        for candidate in candidates:
            evaluate(part, candidate, tasks, retraining, seed)
    print(f"\nTest accuracy in per cent after retraining from scratch:\n\n{summarise(part)}\n")
    print(f"Everything is in {folder.path}: drawings, curves, metrics, genotypes.")


def _plot(options: argparse.Namespace) -> None:
    folder = RunFolder(options.folder)
    draw_run(folder, folder.read_search_settings().tasks)
