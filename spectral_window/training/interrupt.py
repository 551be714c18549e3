"""Ctrl-C and SIGTERM: save first, then stop; asked again, stop at once.

A signal only sets a note; the training loop looks at it between two steps, saves a checkpoint and
leaves, so nothing is ever half done. A second signal raises where the program stands.

One request often arrives as several signals: `timeout` and a terminal signal the whole process
group, and a launcher such as torchrun passes on what its children already got. So whatever comes
within a second of the first is the same request.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST_SECONDS = 1.0


class Interrupted(KeyboardInterrupt):
    """Training stopped because of a signal.

    `exit_code` is 130 (SIGINT) or 143 (SIGTERM); `checkpoint` is the folder to resume from, or None
    if it was stopped at once.
    """

    def __init__(self, signum: int, checkpoint: Path | None = None) -> None:
        name = signal.Signals(signum).name
        if checkpoint:
            what = f"checkpoint saved ({checkpoint}): continue with --resume"
        else:
            what = "stopped at once"
        super().__init__(f"{name}: {what}")
        self.signum, self.exit_code, self.checkpoint = signum, 128 + signum, checkpoint


class StopRequest:
    """What was asked for so far: `signum` is 0 until a signal arrives."""

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0

    def receive(self, signum: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        now = time.monotonic()
        if not self.signum:
            self.signum, self._since = signum, now
        elif now - self._since > SAME_REQUEST_SECONDS:
            raise Interrupted(signum)


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Within the block SIGINT and SIGTERM are noted in the yielded StopRequest; afterwards the old
    handlers are back. Outside the main thread, where Python handles no signals, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    old = {signum: signal.signal(signum, request.receive) for signum in SIGNALS}
    try:
        yield request
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
