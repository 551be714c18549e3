"""A job that says it has begun, sends its parent the signal SIGNUM, and works until it is asked to
stop: python -m tests.lab.slow_job FOLDER SIGNUM [--resume]."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

folder, signum, resumed = Path(sys.argv[1]), int(sys.argv[2]), "--resume" in sys.argv
if resumed:
    (folder / "result").write_text("done")
    sys.exit(0)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until it is waited for
(folder / "begun").write_text("")
os.kill(os.getppid(), signum)
signal.sigwait([signal.SIGTERM])
(folder / "saved").write_text("")
sys.exit(143)
