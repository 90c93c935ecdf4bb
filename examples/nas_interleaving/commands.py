"""What the commands do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.nas_interleaving.algorithms import build_engine, counted_in_steps
from examples.nas_interleaving.command_options import given_settings, read_settings
from examples.nas_interleaving.comparison import Candidate, drawn_at_random, evaluation, found_in
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.options import SettingsError
from examples.nas_interleaving.outlier import load
from examples.nas_interleaving.plots import draw_run
from examples.nas_interleaving.presets import PRESETS
from examples.nas_interleaving.published import find_genotype
from examples.nas_interleaving.report import write_report
from examples.nas_interleaving.retrain import training_batches
from examples.nas_interleaving.run_folder import RunFolder
from examples.nas_interleaving.search import search
from examples.nas_interleaving.search_settings import ONE_ROUND, RANDOM, SearchSettings, refuse_unread
from examples.nas_interleaving.settings import RetrainSettings
from examples.nas_interleaving.table_folder import TableFolder, TablePlan, same_or_refused
from examples.nas_interleaving.table_settings import AblateSettings, CompareSettings
from examples.nas_interleaving.tasks import Task
from examples.nas_interleaving.tensorboard import write_events
from examples.nas_interleaving.workers import work_in_processes

COMMAND = "python -m examples.nas_interleaving"
_EVALUATION = "evaluation"

#: Takes the options, and a list for the folders that it begins to fill.
Command = Callable[[argparse.Namespace, list[RunFolder]], None]

# Whatever can be refused is refused before a command makes a folder, so that it leaves none behind.


def run(options: argparse.Namespace, left: list[RunFolder]) -> None:
    """Search, retrain, test, and compare with a random architecture."""
    preset = _preset(options)
    settings, data = _search_settings(options, preset), read_settings(DataSettings, options, preset)
    retraining = read_settings(RetrainSettings, options, preset)
    seeds = _different(options.seeds or [settings.seed])
    tasks = load(settings.tasks, data)
    for task in tasks:
        training_batches(task, retraining, settings.seed)
    graph = _graph(tasks, settings)
    folder = RunFolder.create(options.folder)
    left.append(folder)
    print(graph)
    with evaluation(folder.new_part(_EVALUATION), tasks, retraining) as results:
        for seed in seeds:
            place = folder if len(seeds) == 1 else folder.new_part(f"seed_{seed}")
            search(place, tasks, replace(settings, seed=seed), data, title=f"search, seed {seed}")
            results.add(found_in(place), seed)
            if settings.algorithm != RANDOM:
                results.add(drawn_at_random(settings.nodes, seed), seed)
    for seed in seeds:
        write_report(folder if len(seeds) == 1 else RunFolder(folder.path / f"seed_{seed}"))
    print(f"\nTest accuracy in per cent after retraining from scratch:\n\n{results.summary()}\n")
    print(f"Everything is in {folder.path}: report.html, drawings, metrics, genotypes.")


def search_only(options: argparse.Namespace, left: list[RunFolder]) -> None:
    """Search an architecture."""
    preset = _preset(options)
    settings, data = _search_settings(options, preset), read_settings(DataSettings, options, preset)
    tasks = load(settings.tasks, data)
    graph = _graph(tasks, settings)
    folder = RunFolder.create(options.folder)
    left.append(folder)
    print(graph)
    search(folder, tasks, settings, data)
    write_report(folder)
    print(f"The search is in {folder.path}; go on with: {COMMAND} evaluate {folder.path}")


def evaluate(options: argparse.Namespace, left: list[RunFolder]) -> None:
    """Retrain an architecture and test it."""
    preset = _preset(options)
    retraining, data = read_settings(RetrainSettings, options, preset), given_settings(DataSettings, options, preset)
    path = Path(options.architecture)
    if not path.is_dir():
        found = Candidate(path.stem, find_genotype(options.architecture))
        names, seeds = options.tasks, options.seeds or [0]
        if not names:
            raise SettingsError("tasks: expected those to test on, since the architecture is not that of a search.")
    else:
        folder = RunFolder(path)
        searched, found = folder.read_search_settings(), found_in(folder)
        names, seeds = options.tasks or searched.tasks, options.seeds or [searched.seed]
        data = {**folder.read_data_settings(), **data}
    tasks = load(names, DataSettings.from_dict(data))
    for task in tasks:
        training_batches(task, retraining, 0)
    seeds = _different(seeds)
    if found.note:
        print(f"Note: {found.note}", file=sys.stderr)
    part = RunFolder(path).new_part(_EVALUATION) if path.is_dir() else RunFolder.create(options.folder)
    left.append(part)
    with evaluation(part, tasks, retraining) as results:
        for seed in seeds:
            results.add(found, seed)
            if found.name != RANDOM:
                results.add(drawn_at_random(found.genotype.nodes, seed), seed)
    print(results.summary())


def compare(options: argparse.Namespace, left: list[RunFolder]) -> None:
    """Fill a table of algorithms and seeds."""
    _fill_table(options, left, CompareSettings)


def ablate(options: argparse.Namespace, left: list[RunFolder]) -> None:
    """Fill a table of interleaving searches that differ in one respect."""
    _fill_table(options, left, AblateSettings)


def plot(options: argparse.Namespace, left: list[RunFolder]) -> None:
    """Draw a search again."""
    folder = RunFolder(options.folder)
    left.append(folder)
    folder.read_search_settings()  # or else it is no search
    if options.tensorboard:
        write_events(folder)
    draw_run(folder)
    write_report(folder)


def _fill_table(
    options: argparse.Namespace, left: list[RunFolder], kind: type[CompareSettings | AblateSettings]
) -> None:
    if options.jobs > 1 and options.threads is not None:
        raise SettingsError(f"threads = {options.threads}: each of {options.jobs} jobs has one. Leave it out, or jobs.")
    table = TableFolder(options.folder)
    if table.exists:
        plan = table.read_plan()
        if not isinstance(plan.table, kind):
            raise SettingsError(f"{options.folder} holds a table of the other kind; expected a folder of its own.")
        preset = _preset(options)
        same_or_refused(plan.search, _given_search(options, preset))
        for stored in (plan.table, plan.retraining, plan.data):
            same_or_refused(stored, given_settings(type(stored), options, preset))
    else:
        plan = _new_plan(options, kind)
        table.create(plan)
    left.append(table.folder)
    print(f"{len(plan.cells())} cells; {sum(map(table.is_done, plan.cells()))} of them are done.")
    if options.jobs == 1:
        table.work()
    else:
        work_in_processes(table, options.jobs)
    table.write_table()
    print(f"\nTest accuracy in per cent after retraining from scratch:\n\n{table.summary()}\n")
    print(f"Everything is in {table.folder.path}.")


def _new_plan(options: argparse.Namespace, kind: type[CompareSettings | AblateSettings]) -> TablePlan:
    preset = _preset(options)
    search = SearchSettings.from_dict(_given_search(options, preset))
    data = read_settings(DataSettings, options, preset)
    plan = TablePlan(
        read_settings(kind, options, preset),
        search,
        counted_in_steps(load(search.tasks, data), search),
        read_settings(RetrainSettings, options, preset),
        data,
    )
    searches = [settings for cell in plan.cells() if cell.seed == plan.table.seeds[0] for settings in cell.searches]
    names = dict.fromkeys(name for settings in searches for name in settings.tasks)
    tasks = {task.name: task for task in load(list(names), data)}
    for settings in searches:
        _graph([tasks[name] for name in settings.tasks], settings)
    for name in search.tasks:
        training_batches(tasks[name], plan.retraining, 0)
    return plan


def _preset(options: argparse.Namespace) -> Mapping[str, Any]:
    return PRESETS[options.preset] if options.preset else {}


def _given_search(options: argparse.Namespace, preset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a search that are given, all counted in steps or all in epochs."""
    for of_steps, of_epochs in (("steps", "epochs"), ("warmup", "warmup_epochs")):
        if getattr(options, of_steps) is not None and getattr(options, of_epochs) is not None:
            raise SettingsError(f"{of_steps} and {of_epochs} are both given; expected one of them.")
    given = given_settings(SearchSettings, options, preset)
    if options.steps is not None:
        given = {name: value for name, value in given.items() if name not in ("epochs", "warmup_epochs")}
    elif options.warmup is not None and given.get("epochs"):
        raise SettingsError(f"warmup counts steps, and epochs = {given['epochs']} are given. Give warmup_epochs.")
    return given


def _search_settings(options: argparse.Namespace, preset: Mapping[str, Any]) -> SearchSettings:
    """Return the settings of one search; an algorithm of one round has one unless more are asked for."""
    given = _given_search(options, preset)
    algorithm = given.get("algorithm", SearchSettings.algorithm)
    if algorithm in ONE_ROUND:
        given.setdefault("rounds", 1)
    refuse_unread(algorithm, given_settings(SearchSettings, options))
    return SearchSettings.from_dict(given)


def _graph(tasks: Sequence[Task], settings: SearchSettings) -> str:
    """Return the graph of a search in words; building it checks that tasks and settings go together."""
    if settings.algorithm == RANDOM:
        return "An architecture is drawn at random; nothing is searched."
    return str(build_engine(tasks, settings).graph)


def _different(seeds: Sequence[int]) -> list[int]:
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise SettingsError(f"seeds: {seed} is given twice; expected different ones.")
    return list(seeds)
