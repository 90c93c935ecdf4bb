"""`python -m examples.nas_interleaving`."""

import sys

from examples.nas_interleaving.cli import main

if __name__ == "__main__":
    sys.exit(main())
