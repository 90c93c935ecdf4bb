"""The problems by name."""

from __future__ import annotations

from mlo.bench.problems import (
    chain,
    cleaning,
    digits_chain,
    ill_conditioned,
    logistic,
    maml,
    nested,
    reweighting,
    ridge,
    supernet,
)
from mlo.bench.problems.family import Family

_MODULES = (ridge, logistic, cleaning, ill_conditioned, maml, chain, digits_chain, nested, reweighting, supernet)

#: All families by name.
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}
