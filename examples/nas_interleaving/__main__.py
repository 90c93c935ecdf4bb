"""`python -m examples.nas_interleaving`."""

import signal
import sys

if __name__ == "__main__":
    try:
        from examples.nas_interleaving.cli import main
    except KeyboardInterrupt:  # loading PyTorch takes seconds
        sys.exit(128 + signal.SIGINT)
    sys.exit(main())
