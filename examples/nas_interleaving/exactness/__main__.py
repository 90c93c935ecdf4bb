"""`python -m examples.nas_interleaving.exactness`: print the table of docs/nas.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from examples.nas_interleaving.exactness.comparison import METHODS, SOLVED, Comparison, Result, steps_back, trained
from examples.nas_interleaving.exactness.reference import solve
from examples.nas_interleaving.exactness.smooth import Smoothed, smooth_search, stages_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.nas_interleaving.exactness",
        description="Compare the hypergradient of each method with the exact one, by solving all stages again at "
        "shifted architectures, on a tiny smooth supernet in float64.",
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, choices=(1, 2, 3), default=1, help="M (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default: 0)")
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 10, 100], help="where to look (default: 1 10 100)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # more only hinder networks this small
    with Smoothed():
        print(compare(options.rounds, options.seed, options.steps))
    return 0


def compare(rounds: int, seed: int, steps: Sequence[int]) -> str:
    """Return the table as Markdown."""
    started = time.perf_counter()
    problems = smooth_search(rounds, seed)
    needed = {n - steps_back(method) for n in steps for method in METHODS.values()}
    at = trained(problems, {0, *(n for n in needed if n >= 0)})
    exact = solve(problems)  # from where training has led: there are several minima
    distances = [_distance(at[n], exact.weights) for n in steps]
    comparison = Comparison(problems, exact, at)
    rows = [["method", "passes", "at the solutions", *(f"after {n} steps" for n in steps)]]
    for name, method in METHODS.items():
        results = [comparison.measure(method, n) for n in (SOLVED, *steps)]
        first = results[0]
        assert first is not None, name
        rows.append([name, f"{first.forward} + {first.reverse}", *map(_shown, results)])
    rows.append(["distance to the solutions", "", "0", *(f"{d:.2f}" for d in distances)])
    rows.insert(1, ["---"] * len(rows[0]))
    stages = stages_of(problems)
    size = sum(p.numel() for p in stages[0].module.parameters())
    return "\n".join(
        [
            f"K = 2, M = {rounds}, λ = 1: {len(stages)} stages of {size} weights, seed {seed}; "
            f"{time.perf_counter() - started:.0f} s. Cosine and relative error; passes forward + reverse.",
            "",
            *("| " + " | ".join(row) + " |" for row in rows),
        ]
    )


def _distance(weights: Mapping[str, Tensor], solved: Mapping[str, Tensor]) -> float:
    """Return ‖W − W*‖ / ‖W*‖ over all stages."""
    pairs = [(weights[name], solution) for name, solution in solved.items()]
    return (torch.cat([w - s for w, s in pairs]).norm() / torch.cat([s for _, s in pairs]).norm()).item()


def _shown(result: Result | None) -> str:
    if result is None:
        return "–"
    error = "< 1e-6" if result.error < 1e-6 else f"{result.error:.2g}"
    return f"{result.cosine:.4f}, {error}" + (" *" if result.broken else "")


if __name__ == "__main__":
    sys.exit(main())
