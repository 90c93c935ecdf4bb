"""`python -m examples.nas_interleaving`."""

import signal
import sys

if __name__ == "__main__":
    # PyTorch takes seconds to load, and answers an exception in the middle with a long traceback or an abort.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from examples.nas_interleaving.cli import main

    signal.signal(signal.SIGINT, handler)
    sys.exit(main())
