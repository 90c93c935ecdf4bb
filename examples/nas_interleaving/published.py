"""Cells that papers have published, to be evaluated beside those of a search."""

from __future__ import annotations

from pathlib import Path

from examples.nas_interleaving.genotype import Genotype
from examples.nas_interleaving.options import SettingsError

_MAX, _AVG, _SKIP = "max_pool_3x3", "avg_pool_3x3", "skip_connect"
_SEP3, _SEP5, _DIL3, _DIL5 = "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"

#: DARTS_V1 and DARTS_V2: found by first and by second order (Liu, Simonyan and Yang, ICLR 2019). PC_DARTS_cifar and
#: PC_DARTS_image: found on CIFAR-10 and on ImageNet (Xu et al., ICLR 2020). PDARTS: found on CIFAR-10 (Chen et al.,
#: ICCV 2019). All as in the code that the authors published.
PUBLISHED = {
    "DARTS_V1": Genotype(
        normal=(
            ((_SEP3, 0), (_SEP3, 1)),
            ((_SKIP, 0), (_SEP3, 1)),
            ((_SKIP, 0), (_SEP3, 1)),
            ((_SEP3, 0), (_SKIP, 2)),
        ),
        reduction=(
            ((_MAX, 0), (_MAX, 1)),
            ((_MAX, 0), (_SKIP, 2)),
            ((_MAX, 0), (_SKIP, 2)),
            ((_AVG, 0), (_SKIP, 2)),
        ),
    ),
    "DARTS_V2": Genotype(
        normal=(
            ((_SEP3, 0), (_SEP3, 1)),
            ((_SEP3, 0), (_SEP3, 1)),
            ((_SKIP, 0), (_SEP3, 1)),
            ((_SKIP, 0), (_DIL3, 2)),
        ),
        reduction=(
            ((_MAX, 0), (_MAX, 1)),
            ((_MAX, 1), (_SKIP, 2)),
            ((_MAX, 0), (_SKIP, 2)),
            ((_MAX, 1), (_SKIP, 2)),
        ),
    ),
    "PC_DARTS_cifar": Genotype(
        normal=(
            ((_SKIP, 0), (_SEP3, 1)),
            ((_SEP3, 0), (_DIL3, 1)),
            ((_SEP5, 0), (_SEP3, 1)),
            ((_AVG, 0), (_DIL3, 1)),
        ),
        reduction=(
            ((_MAX, 0), (_SEP5, 1)),
            ((_SEP5, 1), (_SEP5, 2)),
            ((_SEP3, 0), (_SEP3, 3)),
            ((_SEP3, 1), (_SEP3, 2)),
        ),
    ),
    "PC_DARTS_image": Genotype(
        normal=(
            ((_SEP3, 0), (_SKIP, 1)),
            ((_SEP3, 0), (_SKIP, 1)),
            ((_SEP3, 1), (_SEP3, 3)),
            ((_SEP3, 1), (_DIL5, 4)),
        ),
        reduction=(
            ((_SEP3, 0), (_SKIP, 1)),
            ((_MAX, 1), (_DIL5, 2)),
            ((_SEP3, 1), (_SEP3, 2)),
            ((_SEP5, 0), (_SEP3, 3)),
        ),
    ),
    "PDARTS": Genotype(
        normal=(
            ((_SKIP, 0), (_DIL3, 1)),
            ((_SKIP, 0), (_SEP3, 1)),
            ((_SEP3, 1), (_SEP3, 3)),
            ((_SEP3, 0), (_DIL5, 4)),
        ),
        reduction=(
            ((_AVG, 0), (_SEP5, 1)),
            ((_SEP3, 0), (_DIL5, 2)),
            ((_MAX, 0), (_DIL3, 1)),
            ((_DIL3, 1), (_DIL5, 3)),
        ),
    ),
}


def find_genotype(where: str) -> Genotype:
    """Return the genotype of a published name, or of a JSON file.

    Raises:
        SettingsError: there is no such name and no such file, or the file holds no genotype.

    """
    if where in PUBLISHED:
        return PUBLISHED[where]
    try:
        return Genotype.from_json(Path(where).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SettingsError(
            f"genotype = {where!r}: {reason} Expected one of {', '.join(PUBLISHED)}, or a file such as genotype.json "
            "of a search."
        ) from error
