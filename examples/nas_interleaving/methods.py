"""Hypergradient methods by name, as the command line gives them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import mlo
from examples.nas_interleaving.options import SettingsError
from examples.nas_interleaving.search_settings import ONE_STEP

METHODS: dict[str, type[mlo.HypergradientMethod]] = {
    "finite-difference": mlo.FiniteDifference,
    "unroll": mlo.Unroll,
    "conjugate-gradient": mlo.ConjugateGradient,
    "minres": mlo.MINRES,
    "gmres": mlo.GMRES,
    "nystrom": mlo.Nystrom,
    "neumann": mlo.Neumann,
    "identity": mlo.Identity,
    "adaptive-identity": mlo.AdaptiveIdentity,
    "dense": mlo.Dense,
    "soba": mlo.SOBA,
    "f2sa": mlo.F2SA,
    "stop-gradient": mlo.StopGradient,
}
PRODUCTS = {
    "double-backward": mlo.DoubleBackward,
    "forward-over-reverse": mlo.ForwardOverReverse,
    "central-differences": mlo.CentralDifferences,
}

#: Fields of methods that a text cannot give.
_OBJECTS = ("preconditioner",)


def parse_method(text: str) -> mlo.HypergradientMethod:
    """Return the method that e.g. `"neumann:terms=5,scale=0.1"` describes.

    `product=` takes a name of `PRODUCTS`, and behind central differences a length: `product=central-differences@0.01`.
    """
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise SettingsError(f"method {text!r}: unknown name {name!r}; expected one of {', '.join(METHODS)}.")
    kind = METHODS[name]
    known = [f.name for f in fields(kind) if f.name not in _OBJECTS]
    options = {}
    for part in rest.split(",") if rest else ():
        key, sign, value = part.partition("=")
        if not sign or not value:
            raise SettingsError(f"method {text!r}: expected option=value, got {part!r}.")
        if key not in known:
            raise SettingsError(f"method {text!r}: unknown option {key!r}; {name} has {', '.join(known) or 'none'}.")
        options[key] = _product(text, value) if key == "product" else _value(value)
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if not set(needed) <= set(options):
        raise SettingsError(f"method {text!r}: {name} needs {' and '.join(needed)}, which have no default.")
    return kind(**options)


def _value(text: str) -> Any:
    """Return a number, None or a truth value; any other text stands for itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _product(text: str, value: str) -> Any:
    name, sign, length = value.partition("@")
    if name not in PRODUCTS:
        raise SettingsError(f"method {text!r}: unknown product {name!r}; expected one of {', '.join(PRODUCTS)}.")
    if not sign:
        return PRODUCTS[name]()
    if name != "central-differences":
        raise SettingsError(f"method {text!r}: expected a length behind central-differences alone, got {value!r}.")
    return mlo.CentralDifferences(epsilon=_value(length))


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
    default = parsed.get(None) or parse_method(ONE_STEP)
    return {stage: parsed.get(stage, default) for stage in stages}


def _divided(text: str) -> tuple[str | None, str]:
    """Divide a text into its stage, None for all, and its method."""
    stage, sign, method = text.partition("=")
    if not sign or ":" in stage:  # the "=" is one of an option
        return None, text
    return stage, method
