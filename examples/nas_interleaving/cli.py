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
from examples.nas_interleaving.algorithms import build_engine
from examples.nas_interleaving.comparison import by_darts, drawn_at_random, evaluation, found_in, interleaved
from examples.nas_interleaving.interruption import exit_status, terminable
from examples.nas_interleaving.options import Kind, Settings, SettingsError
from examples.nas_interleaving.plots import draw_run
from examples.nas_interleaving.retrain import training_batches
from examples.nas_interleaving.run_folder import RunFolder, RunFolderError
from examples.nas_interleaving.search import search
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.settings import RetrainSettings
from examples.nas_interleaving.tasks import TaskError, load_tasks

_COMMAND = "python -m examples.nas_interleaving"
_EVALUATION = "evaluation"
_REFUSED = 2

#: Takes the options, and a list for the folders that it begins to fill.
Command = Callable[[argparse.Namespace, list[RunFolder]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    It is 0, 2 for what cannot be done as asked, 130 after Ctrl-C and 143 after SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "run")
    options = _parser().parse_args(given)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    _show_each_warning_once()
    left: list[RunFolder] = []
    try:
        with terminable():
            options.command(options, left)
    except (SettingsError, TaskError, RunFolderError, mlo.ConfigurationError) as error:
        print(f"{_COMMAND}: {error}", file=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt as interruption:
        done = f"What is done so far is in {left[-1].path}." if left else "Nothing was written yet."
        print(f"\nInterrupted. {done}", file=sys.stderr)
        return exit_status(interruption)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_COMMAND,
        description="Interleaving NAS (arXiv 2103.07018): K learners over M rounds search one architecture. "
        "Without a command: run.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "search, retrain, test, and compare with a random architecture")
    _add_new_folder(run)
    run.add_argument("--compare", action="store_true", help="also compare with plain DARTS on each task, over --seeds")
    _add_seeds(run, "--seed; with --compare --seed and two more")
    _add_settings(run, SearchSettings)
    _add_settings(run, RetrainSettings)

    only_search = _command(commands, "search", _search, "search an architecture")
    _add_new_folder(only_search)
    _add_settings(only_search, SearchSettings)

    text = "retrain the architecture of a search from scratch, and test it"
    retrain = _command(commands, "evaluate", _evaluate, text, " FOLDER")
    _add_search(retrain)
    retrain.add_argument(
        "--tasks", nargs="+", action="extend", metavar="TASK", help="tasks (default: those of the search)"
    )
    _add_seeds(retrain, "that of the search")
    _add_settings(retrain, RetrainSettings)

    plot = _command(commands, "plot", _plot, "draw the pictures of a search again from its folder", " FOLDER")
    _add_search(plot)
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, run: Command, text: str, arguments: str = ""
) -> argparse.ArgumentParser:
    # The usage that argparse would write has a line for every option, and stands before every error.
    usage = f"{_COMMAND} {name}{arguments} [OPTION ...]"
    parser = commands.add_parser(name, help=text, description=f"{text.capitalize()}.", usage=usage, allow_abbrev=False)
    parser.set_defaults(command=run)
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="threads of PyTorch (default: PyTorch's own choice)"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _add_new_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs") / f"nas_{datetime.now():%Y%m%d_%H%M%S}",
        help="new folder for everything that the run leaves (default: %(default)s, after the time)",
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a search")


def _add_seeds(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--seeds", type=int, nargs="+", action="extend", metavar="N", help=f"seeds (default: {default})"
    )


def _add_settings(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    group = parser.add_argument_group((kind.__doc__ or "").partition("\n")[0].rstrip("."))
    for f in fields(kind):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if isinstance(f.default, tuple):
            text += f" (default: {' '.join(f.default)})"
            group.add_argument(flag, nargs="+", action="extend", metavar=f.name.removesuffix("s").upper(), help=text)
        else:
            text += f" (default: {f.default})"
            group.add_argument(flag, type=type(f.default), metavar=f.name.upper(), help=text)


def _settings(kind: type[Kind], options: argparse.Namespace) -> Kind:
    """Return the settings: those that are given, and the defaults of all others."""
    given = {f.name: getattr(options, f.name) for f in fields(kind)}
    return kind.from_dict({name: value for name, value in given.items() if value is not None})


def _for_each_seed(settings: SearchSettings, seeds: Sequence[int]) -> list[SearchSettings]:
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise SettingsError(f"seeds: {seed} is given twice; expected different ones.")
    return [replace(settings, seed=seed) for seed in seeds]


def _show_each_warning_once() -> None:
    """Show each warning once: a search of a thousand steps must not repeat it."""
    warnings.simplefilter("once", mlo.MloWarning)


# Whatever can be refused is refused before a command makes a folder, so that it leaves none behind.


def _search(options: argparse.Namespace, left: list[RunFolder]) -> None:
    settings = _settings(SearchSettings, options)
    tasks = load_tasks(settings.tasks)
    engine = build_engine(tasks, settings)
    folder = RunFolder.create(options.folder)
    left.append(folder)
    print(engine.graph)
    search(folder, tasks, settings)
    print(f"The search is in {folder.path}; go on with: {_COMMAND} evaluate {folder.path}")


def _evaluate(options: argparse.Namespace, left: list[RunFolder]) -> None:
    folder = RunFolder(options.folder)
    retraining = _settings(RetrainSettings, options)
    searched, found = folder.read_search_settings(), found_in(folder)
    searches = _for_each_seed(searched, options.seeds or [searched.seed])
    tasks = load_tasks(options.tasks or searched.tasks)
    for task in tasks:
        training_batches(task, retraining, searched.seed)
    if found.note:
        print(f"Note: {found.note}", file=sys.stderr)
    part = folder.new_part(_EVALUATION)
    left.append(part)
    with evaluation(part, tasks, retraining) as results:
        for settings in searches:
            results.add(found, settings.seed)
            results.add(drawn_at_random(settings), settings.seed)
    print(results.summary())


def _run(options: argparse.Namespace, left: list[RunFolder]) -> None:
    searching, retraining = _settings(SearchSettings, options), _settings(RetrainSettings, options)
    seeds = options.seeds or [searching.seed + i for i in range(3 if options.compare else 1)]
    searches = _for_each_seed(searching, seeds)
    tasks = load_tasks(searching.tasks)
    for task in tasks:
        training_batches(task, retraining, searching.seed)
    engine = build_engine(tasks, searching)
    folder = RunFolder.create(options.folder)
    left.append(folder)
    print(engine.graph)
    single = len(seeds) == 1 and not options.compare
    with evaluation(folder.new_part(_EVALUATION), tasks, retraining) as results:
        for settings in searches:
            place = folder if single else folder.new_part(f"seed_{settings.seed}")
            candidates = [
                interleaved(place if single else place.new_part("interleaving"), tasks, settings),
                drawn_at_random(settings),
            ]
            if options.compare:
                candidates += [by_darts(place.new_part("darts"), task, settings) for task in tasks]
            for candidate in candidates:
                results.add(candidate, settings.seed)
    print(f"\nTest accuracy in per cent after retraining from scratch:\n\n{results.summary()}\n")
    print(f"Everything is in {folder.path}: drawings, curves, metrics, genotypes.")


def _plot(options: argparse.Namespace, left: list[RunFolder]) -> None:
    folder = RunFolder(options.folder)
    left.append(folder)
    draw_run(folder)
