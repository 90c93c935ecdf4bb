"""Hypergradient methods by name, as the command line gives them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import fields

import mlo
from examples.nas_interleaving.options import SettingsError

METHODS: dict[str, type[mlo.HypergradientMethod]] = {
    "finite-difference": mlo.FiniteDifference,
    "neumann": mlo.Neumann,
    "conjugate-gradient": mlo.ConjugateGradient,
    "identity": mlo.Identity,
    "stop-gradient": mlo.StopGradient,
    "dense": mlo.Dense,
}


def parse_method(text: str) -> mlo.HypergradientMethod:
    """Return the method that e.g. `"neumann:terms=5,scale=0.1"` describes."""
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise SettingsError(f"method {text!r}: unknown name {name!r}; expected one of {', '.join(METHODS)}.")
    kind = METHODS[name]
    options = {}
    for part in rest.split(",") if rest else ():
        key, sign, value = part.partition("=")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise SettingsError(f"method {text!r}: expected option=value, got {part!r}.") from None
        if not sign or key not in {f.name for f in fields(kind)}:
            known = ", ".join(f.name for f in fields(kind)) or "none"
            raise SettingsError(f"method {text!r}: unknown option {key!r}; {name} has {known}.")
    return kind(**options)


def stage_methods(texts: Sequence[str], stages: Sequence[str]) -> dict[str, mlo.HypergradientMethod]:
    """Return each stage's method: that of its `stage=method`, or else the one text that names no stage."""
    chosen: dict[str | None, str] = {}
    for text in texts:
        stage, method = _divided(text)
        if stage is not None and stage not in stages:
            raise SettingsError(f"method {text!r}: unknown stage {stage!r}; the stages are {', '.join(stages)}.")
        if stage in chosen:
            whose = "all stages" if stage is None else f"stage {stage!r}"
            raise SettingsError(
                f"method: two methods for {whose}, {chosen[stage]!r} and {method!r}; expected one. "
                "stage=method gives a stage one of its own."
            )
        chosen[stage] = method
    parsed = {stage: parse_method(method) for stage, method in chosen.items()}
    default = parsed.get(None, mlo.FiniteDifference())
    return {stage: parsed.get(stage, default) for stage in stages}


def _divided(text: str) -> tuple[str | None, str]:
    """Divide a text into its stage, None for all, and its method."""
    stage, sign, method = text.partition("=")
    if not sign or ":" in stage:  # the "=" is one of an option
        return None, text
    return stage, method
