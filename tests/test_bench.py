"""The benchmark: its problems know their hypergradients, its loops agree, its records and reports hold."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import warnings
from functools import cache
from pathlib import Path
from time import sleep

import pytest
import torch

from mlo.bench import cli
from mlo.bench.experiments import EXPERIMENTS, accuracy
from mlo.bench.experiments.measured import relative_error
from mlo.bench.experiments.settings import Settings
from mlo.bench.libraries import LIBRARIES
from mlo.bench.libraries.base import Library
from mlo.bench.libraries.by_hand import ByHand
from mlo.bench.libraries.functional import FunctionalView
from mlo.bench.libraries.ours import Ours
from mlo.bench.measure.clock import Ratio, alternating
from mlo.bench.measure.memory import peak_bytes
from mlo.bench.measure.passes import reverse_passes
from mlo.bench.problems import FAMILIES
from mlo.bench.problems.data import fashion_mnist
from mlo.bench.problems.dense import dense_hypergradient
from mlo.bench.records import FIELDS, completed, read
from mlo.bench.report import write_report
from mlo.bench.report.selection import together
from mlo.bench.runner import run
from mlo.bench.specification import KINDS, Method
from mlo.compiled_loss import CannotCompileError, CompiledLoss
from mlo.errors import ConfigurationError

CPU = torch.device("cpu")
EXACT = [
    "ridge 50",
    "ridge breast-cancer",
    "logistic breast-cancer",
    "cleaning breast-cancer",
    "ill-conditioned 1e2",
    "maml 4-tasks",
    "chain last-4",
    "chain all-4",
    "chain dense-4",
    "nested quadratic-3",
    "nested curved-3",
]
FLAT = [name for name in EXACT if not name.startswith("nested")]


@cache
def case_of(name):
    family, size = name.split(" ")
    return FAMILIES[family].case(size)


def methods(text):
    return tuple(map(Method.parse, text.split(",")))


# --- problems ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_our_dense_solution_is_the_exact_hypergradient(name):
    case = case_of(name)
    assert relative_error(Ours().hypergradient(case, Method("dense"))(), case.exact()) < 1e-11


@pytest.mark.parametrize("name", FLAT)
def test_stages_stand_at_their_solutions_with_their_largest_eigenvalue(name):
    case = case_of(name)
    modules = {stage.name: stage.module() for stage in case.stages}
    views = {n: FunctionalView(m, dict(m.named_parameters())) for n, m in modules.items()}
    for stage in case.lower:
        own = list(modules[stage.name].parameters())
        loss = stage.loss(views[stage.name], {n: views[n] for n in stage.reads}, stage.batches[0])
        gradient = torch.autograd.grad(loss, own, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in gradient])
        assert flat.norm() < 1e-9
        rows = [torch.autograd.grad(g, own, retain_graph=True, materialize_grads=True) for g in flat]
        hessian = torch.stack([torch.cat([t.reshape(-1) for t in row]) for row in rows])
        eigenvalues = torch.linalg.eigvalsh(hessian)
        assert eigenvalues[0] > 0
        assert stage.factor == pytest.approx(1 / eigenvalues[-1].item(), rel=1e-6)


@pytest.mark.parametrize("name", ["ridge 50", "ill-conditioned 1e2"])
def test_closed_forms_agree_with_the_dense_sweep(name):
    case = case_of(name)
    assert relative_error(dense_hypergradient(case.stages), case.exact()) < 1e-11


def test_the_exact_hypergradient_is_the_slope_of_the_solved_objective():
    """Move the penalties of ridge regression, solve anew, and look at the outer objective."""
    case = case_of("ridge 50")
    (x, y), (x_held_out, y_held_out) = case.lower[0].batches[0], case.upper.batches[0]
    log = case.upper.module()["log"].detach()

    def objective(log):
        w = torch.linalg.solve(x.T @ x / len(y) + torch.diag(log.exp()), x.T @ y / len(y))
        return 0.5 * (x_held_out @ w - y_held_out).square().mean()

    direction = torch.linspace(-1, 1, len(log))
    slope = (objective(log + 1e-5 * direction) - objective(log - 1e-5 * direction)) / 2e-5
    assert slope.item() == pytest.approx((case.exact()["log"] @ direction).item(), rel=1e-6)


def test_a_problem_is_the_same_each_time_and_another_with_another_seed():
    first, again, other = (FAMILIES["ridge"].case("50", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.exact()["log"], again.exact()["log"])
    assert not torch.equal(first.exact()["log"], other.exact()["log"])


@pytest.mark.parametrize("name", ["chain dense-4", "cleaning breast-cancer", "supernet small"])
def test_single_precision_reaches_parameters_and_batches(name):
    family, size = name.split(" ")
    case = FAMILIES[family].case(size, dtype=torch.float32)
    for stage in case.stages:
        assert {p.dtype for p in stage.module().parameters()} == {torch.float32}
        assert {p.dtype for p in stage.beginning().parameters()} == {torch.float32}
        assert torch.float64 not in {t.dtype for t in stage.batches[0]}
    if case.exact is not None:
        error = relative_error(Ours().hypergradient(case, Method("dense"))(), case.exact())
        assert 1e-9 < error < 1e-4


def test_an_unknown_size_is_an_error_that_names_the_others():
    with pytest.raises(ConfigurationError, match="expected one of 50, breast-cancer, 200"):
        FAMILIES["ridge"].case("51")


def test_fashion_mnist_is_read_from_plain_and_packed_files(tmp_path):
    images = torch.arange(600 * 784, dtype=torch.int64).remainder(256).to(torch.uint8)
    labels = torch.arange(600).remainder(10).to(torch.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes(16) + images.numpy().tobytes())
    with pytest.raises(ConfigurationError, match=re.escape(f"train-labels-idx1-ubyte (or with .gz) in {tmp_path}")):
        fashion_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.numpy().tobytes()))
    data = fashion_mnist(tmp_path)
    assert data.x.shape == (600, 784)
    assert torch.equal(data.y, labels.long())
    assert data.x[0, 51].item() == pytest.approx((51 / 255 - 0.2860) / 0.3530)
    case = FAMILIES["cleaning"].case("fashion-mnist", data=tmp_path)
    assert case.lower[0].batches[0][0].shape == (50, 784)


# --- methods and libraries -----------------------------------------------------------------------------------------


def test_methods_are_read_and_written():
    assert Method.parse(" cg:20 ") == Method("cg", 20)
    assert {str(Method.parse(text)) for text in ("fd", "unroll:3")} == {"fd", "unroll:3"}
    for wrong in ("cg", "cg:0", "cg:x", "fd:3", "magic:2", "cg:-1"):
        with pytest.raises(ConfigurationError):
            Method.parse(wrong)


# (Conjugate gradients need a positive definite Hessian, which an MLP far from its solution does not have.)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, m) for name in ("ridge 50", "chain dense-6") for m in methods("fd,identity,neumann:20,cg:5")),
        *(("reweighting digits", m) for m in methods("fd,neumann:5")),
    ],
    ids=str,
)
def test_the_hand_written_sweep_computes_the_same(name, method):
    case = case_of(name)
    ours, by_hand = (library.hypergradient(case, method)() for library in (Ours(), ByHand()))
    assert relative_error(ours, by_hand) < 1e-10


@pytest.mark.skipif(LIBRARIES["mlo-compiled"].unavailable() is not None, reason="this torch compiles no reverse pass")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "error::mlo.MloWarning")
@pytest.mark.parametrize("method", methods("fd,identity,cg:3,neumann:3"), ids=str)
def test_compiled_losses_give_the_same(method):
    case = case_of("chain last-2")
    compiled, ours = (LIBRARIES[name].hypergradient(case, method)() for name in ("mlo-compiled", "mlo"))
    assert relative_error(compiled, ours) < 1e-10


@pytest.mark.skipif(LIBRARIES["mlo-compiled"].unavailable() is not None, reason="this torch compiles no reverse pass")
@pytest.mark.filterwarnings("ignore::mlo.MloWarning")
def test_what_is_called_compiled_and_is_not_is_a_failure(monkeypatch):
    def refuse(*_):
        raise CannotCompileError("the compiler is on strike")

    monkeypatch.setattr(CompiledLoss, "__call__", refuse)
    case, compiled = case_of("ridge 50"), LIBRARIES["mlo-compiled"]
    with pytest.raises(RuntimeError, match=r"cannot be compiled as one function\. the compiler is on strike"):
        compiled.hypergradient(case, Method("fd"))
    loop = compiled.training(case, Method("fd"))
    while loop.engine.step_count < 2:  # which are checks
        loop.engine.step()
    with pytest.raises(RuntimeError, match="on strike"):
        loop.step()
    assert compiled.refuses(case, Method("cg", 5)) is None
    assert "20 steps" in compiled.refuses(case, Method("cg", 21))
    assert "20 steps" in compiled.refuses(case, Method("gmres", 5))


# The supernet's kinks (ReLU, max-pooling) let central differences of different lengths differ: the engine may warn.
@pytest.mark.filterwarnings("ignore::mlo.MloWarning")
@pytest.mark.parametrize("name", ["ridge 50", "chain dense-4", "reweighting digits", "supernet small"])
def test_the_hand_written_loop_takes_the_same_steps(name):
    case = case_of(name)
    ours, by_hand = (library.training(case, Method("fd")) for library in (Ours(), ByHand()))
    start = ours.metric()
    for _ in range(1 if name.startswith("supernet") else 3):
        ours.step()
        by_hand.step()
    assert ours.metric() != start
    assert ours.metric() == pytest.approx(by_hand.metric(), rel=1e-9)


def test_the_hand_written_sweep_makes_as_many_passes_as_there_are_edges_to_serve():
    """One for the upper loss; two differences per stage, or a gradient, five products and a mixed product."""
    case = case_of("chain dense-6")
    for method, expected in (("fd", 1 + 6 * 2), ("cg:5", 1 + 6 * 7)):
        assert reverse_passes(ByHand().hypergradient(case, Method.parse(method))) == expected


def test_a_hypergradient_can_be_computed_again():
    case = case_of("ridge 50")
    for library in (Ours(), ByHand()):
        for method in methods("fd,cg:5,unroll:3"):
            if library.refuses(case, method) is None:
                call = library.hypergradient(case, method)
                assert relative_error(call(), call()) < 1e-11, (library.name, str(method))


def test_every_kind_of_method_has_a_counterpart_of_ours():
    case = case_of("ridge 50")
    for kind in KINDS:
        method = Method(kind) if kind in ("fd", "identity", "dense") else Method(kind, 5)
        assert Ours().hypergradient(case, method)()["log"].isfinite().all()


# --- what is measured ----------------------------------------------------------------------------------------------


def test_reverse_passes_are_counted_whatever_starts_them():
    x = torch.ones(3, requires_grad=True)

    def call():
        x.square().sum().backward()
        torch.autograd.backward(x.square().sum())
        torch.autograd.grad(x.square().sum(), x)
        torch.func.grad(lambda v: v.square().sum())(x)

    before = torch.autograd.graph._engine_run_backward
    assert reverse_passes(call) == 4
    assert torch.autograd.graph._engine_run_backward is torch.autograd._engine_run_backward is before


def test_the_counter_is_taken_out_after_an_exception():
    before = torch.autograd._engine_run_backward
    with pytest.raises(ZeroDivisionError):
        reverse_passes(lambda: 1 / 0)
    assert torch.autograd._engine_run_backward is before


def test_peak_memory_is_that_of_what_lives_at_once():
    def call():
        a = torch.zeros(1000)
        b = torch.zeros(500)
        del a
        return b + torch.zeros(700).sum()

    assert peak_bytes(call, CPU) == 8 * 1500
    assert peak_bytes(lambda: torch.ones(10).numpy(), CPU) == 80


def test_alternating_runs_are_made_in_turn_and_end_in_time():
    made = []
    times = alternating({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, rounds=4, seconds=9, device=CPU)
    assert {name: len(runs) for name, runs in times.items()} == {"a": 4, "b": 4}
    assert [sorted(made[i : i + 2]) for i in range(0, len(made), 2)] == [["a", "b"]] * 5
    times = alternating({"a": lambda: None}, rounds=100, seconds=0, device=CPU)
    assert len(times["a"]) == 3
    times = alternating({"slow": lambda: sleep(0.02), "fast": lambda: None}, rounds=30, seconds=0.1, device=CPU)
    assert 3 <= len(times["slow"]) <= 6, "it has used up its time after five runs at the latest"
    assert len(times["fast"]) == 30
    assert Ratio.of(times["slow"], times["fast"]).pairs == len(times["slow"])


def test_a_ratio_has_an_interval_that_holds_it():
    ratio = Ratio.of([1.0, 1.1, 1.2, 1.3, 5.0], [1.0] * 5)
    assert (ratio.median, ratio.pairs) == (1.2, 5)
    assert ratio.low < 1.2 < ratio.high


# --- runs ----------------------------------------------------------------------------------------------------------


def bench(*arguments):
    return cli.main([str(argument) for argument in arguments])


def small_run(file):
    problems = ("--problems", "ridge,chain,reweighting", "--sizes", "50,dense-2,dense-4,random-decay")
    others = ("--methods", "fd,cg:5,unroll:3", "--repetitions", 2, "--threads", 1, "--libraries", "mlo,by-hand")
    return bench("run", "--quick", *problems, *others, "--output", file)


@pytest.fixture(scope="module")
def records_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "records.jsonl"
    assert small_run(file) == 0
    return file


def test_a_run_makes_complete_records_of_every_experiment(records_file):
    records = read([records_file])
    assert {r["experiment"] for r in records} == set(EXPERIMENTS)
    for record in records:
        assert tuple(record)[: len(FIELDS)] == FIELDS
        assert record["environment"]["torch"] == torch.__version__
        assert record["threads"] == 1
    done = [r for r in records if r["failure"] is None and r["experiment"] == "accuracy"]
    by_key = {(r["problem"], r["size"], r["method"], r["library"]): r for r in done}
    ours = by_key["ridge", "50", "cg:5", "mlo"]
    assert (ours["dtype"], ours["budget"], ours["seconds"]["runs"]) == ("float64", 5, 2)
    assert ours["reverse_passes"] == 8
    assert 0 < ours["error"] < 1
    assert ours["memory_bytes"] > 0
    assert ours["error"] == pytest.approx(by_key["ridge", "50", "cg:5", "by-hand"]["error"], rel=1e-6)


def test_a_run_that_is_measured_again_is_added_to_the_file(tmp_path):
    file, options = tmp_path / "a.jsonl", ("--experiments", "accuracy", "--problems", "ridge", "--methods", "fd")
    for _ in range(2):
        assert bench("run", "--quick", *options, "--libraries", "mlo", "--repetitions", 1, "--output", file) == 0
    assert len(read([file])) == 2
    assert len(together(read([file]))) == 1


def test_a_report_is_the_same_each_time(records_file, tmp_path):
    for folder in ("first", "again"):
        assert bench("report", records_file, "--output", tmp_path / folder) == 0
    first = sorted((tmp_path / "first").iterdir())
    assert [path.name for path in first] == [
        "error_against_memory.png",
        "error_against_passes.png",
        "error_against_time.png",
        "outer_objective.png",
        "tables.md",
        "time_against_stages.png",
    ]
    for path in first:
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_tables_show_what_the_records_say(records_file, tmp_path):
    (path,) = write_report(read([records_file]), tmp_path, plots=False)
    text = path.read_text()
    for heading in ("Overhead of a step", "Chains of stages", "Memory", "Convergence", "Not measured"):
        assert f"### {heading}" in text
    assert "no loop for unroll is written here" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") > 4
    ours = next(r for r in read([records_file]) if r["method"] == "cg:5" and r["library"] == "mlo")
    assert f"| `cg:5` | mlo | {ours['error']:.1e} | 8 |" in text


def test_seeds_are_put_together_by_their_median():
    base = {"experiment": "accuracy", "problem": "p", "size": "s", "method": "fd", "library": "mlo"}
    records = [completed({**base, "seed": seed, "error": float(seed)}, {}) for seed in (0, 1, 5)]
    failed = completed({**base, "seed": 6, "failure": "why"}, {})
    (merged,) = together([*records, failed])
    assert (merged["error"], merged["failure"]) == (1.0, None)


class Faulty(Library):
    """A library that fails in some way."""

    name = "faulty"

    def __init__(self, hypergradient):
        self._hypergradient = hypergradient

    def version(self):
        return "0"

    def hypergradient(self, case, method):
        return self._hypergradient


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: {"log": torch.full((50,), torch.nan)}, "the hypergradient is not finite"),
        (lambda: {"log": torch.zeros(49)}, "expected a hypergradient with log of (50,)"),
        (lambda: None, "AttributeError"),
    ],
)
def test_a_failing_library_is_a_row_that_says_why(call, why, tmp_path):
    families = {"ridge": FAMILIES["ridge"]}
    settings = Settings(families, (Faulty(call), Ours()), sizes=("50",), methods=methods("fd"), repetitions=1)
    records = list(run(accuracy.tasks(settings), settings))
    failures = {r["library"]: r["failure"] for r in records}
    assert why in failures["faulty"]
    assert failures["mlo"] is None
    assert why in write_report(records, tmp_path, plots=False)[0].read_text()


def test_a_library_that_fails_later_keeps_its_first_result_and_harms_no_other():
    results = iter([{"log": torch.zeros(50)}])
    families = {"ridge": FAMILIES["ridge"]}
    libraries = (Faulty(lambda: next(results)), Ours())
    settings = Settings(families, libraries, sizes=("50",), methods=methods("fd"), repetitions=1)
    faulty, ours = run(accuracy.tasks(settings), settings)
    assert (faulty["error"], faulty["failure"]) == (1.0, None)
    assert any("StopIteration" in text for text in faulty["warnings"])
    assert ours["failure"] is None
    assert ours["memory_bytes"] > 0


def test_a_problem_that_cannot_be_built_is_a_row_and_the_others_are_run(tmp_path):
    settings = Settings(FAMILIES, (Ours(),), sizes=("fashion-mnist",), data=tmp_path, methods=methods("fd"))
    records = list(run(EXPERIMENTS["convergence"](settings), settings))
    assert len(records) == 2
    assert all("Fashion-MNIST: expected the files" in r["failure"] for r in records)


def test_what_a_library_warns_of_is_kept():
    def call():
        warnings.warn("the moon is full", UserWarning, stacklevel=1)
        return {"log": torch.zeros(50)}

    families = {"ridge": FAMILIES["ridge"]}
    settings = Settings(families, (Faulty(call),), sizes=("50",), methods=methods("fd"), repetitions=1)
    (record,) = run(accuracy.tasks(settings), settings)
    assert record["warnings"] == ["UserWarning: the moon is full"]


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    library = Faulty(None)
    calls = iter([{"log": torch.zeros(50)}] * 20)
    library.hypergradient = lambda case, method: (lambda: next(calls)) if method.kind == "fd" else interrupt
    monkeypatch.setitem(LIBRARIES, "mlo", library)
    file = tmp_path / "kept.jsonl"
    options = ("--experiments", "accuracy", "--problems", "ridge", "--methods", "fd,cg:5", "--libraries", "mlo")
    assert bench("run", "--quick", *options, "--repetitions", 1, "--output", file) == 130
    assert [r["method"] for r in read([file])] == ["fd"]
    assert f"1 records are kept in {file}" in capsys.readouterr().err


def test_what_would_take_too_long_is_left_out_with_the_reason():
    families = {"chain": FAMILIES["chain"]}
    sizes = ("last-2", "last-4", "last-8")
    settings = Settings(families, (ByHand(),), sizes=sizes, methods=methods("fd"), repetitions=1, time_limit=0.0)
    records = list(run(EXPERIMENTS["chains"](settings), settings))
    assert [r["failure"] is None for r in records] == [True, True, False]
    assert "over --time-limit 0" in records[-1]["failure"]


def test_options_that_cannot_be_are_refused(tmp_path, capsys):
    for wrong in (("--methods", "magic"), ("--problems", "none"), ("--threads", "0"), ("--device", "quantum")):
        with pytest.raises(SystemExit):
            bench("run", *wrong, "--output", tmp_path / "x")
    assert "expected one of fd, identity" in capsys.readouterr().err
    assert bench("run", "--sizes", "none-such", "--output", tmp_path / "x") == 2
    assert "expected a selection with something to run" in capsys.readouterr().err
    assert bench("report", tmp_path / "none.jsonl") == 2
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert bench("report", tmp_path / "bad.jsonl") == 2
    (tmp_path / "cut.jsonl").write_text('{"experiment": "acc')
    assert bench("report", tmp_path / "cut.jsonl") == 2
    assert "cut.jsonl, line 1: expected a record as JSON" in capsys.readouterr().err


def test_the_list_names_everything(capsys):
    assert bench("list") == 0
    shown = capsys.readouterr().out
    for name in (*EXPERIMENTS, *FAMILIES, *KINDS, *LIBRARIES):
        assert re.search(rf"^  {re.escape(name)}\b", shown, re.MULTILINE), name


def test_a_library_that_is_missing_says_how_to_install_it():
    for library in LIBRARIES.values():
        reason = library.unavailable()
        assert reason is None or "pip install" in reason


def test_every_experiment_has_tasks_in_both_forms():
    for quick in (True, False):
        settings = Settings(FAMILIES, tuple(LIBRARIES.values()), quick=quick)
        counts = {name: len(tasks(settings)) for name, tasks in EXPERIMENTS.items()}
        assert all(counts.values()), counts
    titles = [task.title for task in EXPERIMENTS["chains"](settings)]
    assert "chains chain dense-64 cg:5" in titles


def test_records_are_plain_json(records_file):
    for line in Path(records_file).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
