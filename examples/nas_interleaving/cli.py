"""The command line."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

import mlo
from examples.nas_interleaving import commands
from examples.nas_interleaving.command_options import add_new_folder, add_settings, positive
from examples.nas_interleaving.commands import COMMAND, Command
from examples.nas_interleaving.data.labelled_images import DataError
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.interruption import exit_status, terminable
from examples.nas_interleaving.options import SettingsError
from examples.nas_interleaving.presets import PRESETS
from examples.nas_interleaving.published import PUBLISHED
from examples.nas_interleaving.run_folder import RunFolder, RunFolderError
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.settings import RetrainSettings
from examples.nas_interleaving.table_settings import AblateSettings, CompareSettings

_REFUSED = 2


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
    except (SettingsError, DataError, RunFolderError, mlo.ConfigurationError) as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt as interruption:
        done = f"What is done so far is in {left[-1].path}." if left else "Nothing was written yet."
        print(f"\nInterrupted. {done}", file=sys.stderr)
        return exit_status(interruption)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Interleaving NAS (arXiv 2103.07018): K learners over M rounds search one architecture. "
        "Without a command: run.",
        allow_abbrev=False,
    )
    to = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(to, "run", commands.run, "search, retrain, test, and compare with a random architecture")
    add_new_folder(run)
    _add_seeds(run, "--seed")
    for kind in (SearchSettings, RetrainSettings, DataSettings):
        add_settings(run, kind)

    search = _command(to, "search", commands.search_only, "search an architecture")
    add_new_folder(search)
    for kind in (SearchSettings, DataSettings):
        add_settings(search, kind)

    text = "retrain an architecture from scratch, and test it"
    where = f"folder of a search, a genotype's JSON file, or a published cell: {', '.join(PUBLISHED)}"
    evaluate = _command(to, "evaluate", commands.evaluate, text, " ARCHITECTURE")
    evaluate.add_argument("architecture", metavar="ARCHITECTURE", help=where)
    add_new_folder(evaluate, "new folder for the results, unless the architecture is that of a search")
    evaluate.add_argument(
        "--tasks", nargs="+", action="extend", metavar="TASK", help="tasks (default: those of the search)"
    )
    _add_seeds(evaluate, "that of the search, or 0")
    for kind in (RetrainSettings, DataSettings):
        add_settings(evaluate, kind)

    _table(to, "compare", commands.compare, CompareSettings, "fill a table of algorithms and seeds, in parts")
    _table(
        to, "ablate", commands.ablate, AblateSettings, "fill a table of searches that differ in one respect, in parts"
    )

    plot = _command(
        to,
        "plot",
        commands.plot,
        "draw the pictures and write the report of a search from its folder",
        " FOLDER",
    )
    plot.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a search")
    plot.add_argument("--tensorboard", action="store_true", help="also write event files for TensorBoard")
    return parser


def _table(
    to: argparse._SubParsersAction,
    name: str,
    run: Command,
    kind: type[CompareSettings | AblateSettings],
    text: str,
) -> None:
    parser = _command(to, name, run, text)
    add_new_folder(parser, "folder of the table: a new one, or that of an unfinished table to go on with")
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="processes, each with one thread if several (default: 1)"
    )
    add_settings(parser, kind)
    add_settings(parser, SearchSettings, without=("algorithm", "seed"))
    add_settings(parser, RetrainSettings)
    add_settings(parser, DataSettings)


def _command(
    to: argparse._SubParsersAction, name: str, run: Command, text: str, arguments: str = ""
) -> argparse.ArgumentParser:
    # The usage that argparse would write has a line for every option, and stands before every error.
    usage = f"{COMMAND} {name}{arguments} [OPTION ...]"
    parser = to.add_parser(name, help=text, description=f"{text.capitalize()}.", usage=usage, allow_abbrev=False)
    parser.set_defaults(command=run)
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads of PyTorch (default: PyTorch's own choice)"
    )
    if name != "plot":
        parser.add_argument(
            "--preset", choices=PRESETS, help="settings to begin with; other options change them (default: no preset)"
        )
    return parser


def _add_seeds(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--seeds", type=int, nargs="+", action="extend", metavar="N", help=f"seeds (default: {default})"
    )


def _show_each_warning_once() -> None:
    """Show each warning once: a search of a thousand steps must not repeat it."""
    warnings.simplefilter("once", mlo.MloWarning)
