"""A job that says it has begun and works until it is asked to stop: python -m tests.lab.slow_job
FOLDER [--resume]."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

folder, resumed = Path(sys.argv[1]), "--resume" in sys.argv
stopped: list[int] = []
signal.signal(signal.SIGTERM, lambda signum, frame: stopped.append(signum))
if resumed:
    (folder / "result").write_text("done")
    sys.exit(0)
(folder / "begun").write_text("")
while not stopped:
    time.sleep(0.02)
(folder / "saved").write_text("")
sys.exit(143)
