"""`python -m spectral_window` is the command `spectral-window`."""

import sys

from spectral_window.cli import main

sys.exit(main())
