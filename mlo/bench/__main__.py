"""`python -m mlo.bench`."""

import sys

from mlo.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
