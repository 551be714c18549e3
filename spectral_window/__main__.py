"""`python -m spectral_window` is the command `spectral-window`, and this is where both begin.

What takes time to import is imported within, so that Ctrl-C is one line from the start.
"""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the process's own command line; returns the exit code."""
    try:
        from spectral_window.cli import main as run

        code = run()
    except KeyboardInterrupt:  # during that import
        print("spectral-window: error: interrupted", file=sys.stderr)
        code = 130
    # All is done: a signal while the interpreter takes itself apart ends it without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


if __name__ == "__main__":
    sys.exit(main())
