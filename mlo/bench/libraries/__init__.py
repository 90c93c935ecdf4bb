"""The libraries: `mlo`, hand-written loops, and the peers, each imported only where it is used."""

from __future__ import annotations

from mlo.bench.libraries.base import Library
from mlo.bench.libraries.betty import Betty
from mlo.bench.libraries.boat import Boat
from mlo.bench.libraries.by_hand import ByHand
from mlo.bench.libraries.higher import Higher
from mlo.bench.libraries.jaxopt import JAXopt
from mlo.bench.libraries.ours import Ours, OursCompiled
from mlo.bench.libraries.torchopt import TorchOpt

#: All libraries by name, in the order of the tables.
LIBRARIES: dict[str, Library] = {
    library.name: library
    for library in (Ours(), OursCompiled(), ByHand(), Betty(), TorchOpt(), Higher(), Boat(), JAXopt())
}
