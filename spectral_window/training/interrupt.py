"""Ctrl-C and SIGTERM: save first, then stop; a second signal stops at once.

A signal only sets a note; the training loop looks at it between two steps, saves a checkpoint and
leaves, so nothing is ever half done. The second signal raises where the program stands. Under
torchrun the launcher passes the terminal's signal on to processes that already had it, so there a
repetition within two seconds counts as the same one.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO_SECONDS = 2.0


class Interrupted(KeyboardInterrupt):
    """Training stopped because of a signal. `exit_code` is 130 (SIGINT) or 143 (SIGTERM);
    `checkpoint` is the folder saved, or None if it was stopped at once."""

    def __init__(self, signum: int, checkpoint: Path | None = None) -> None:
        name = signal.Signals(signum).name
        saved = (
            f"checkpoint saved ({checkpoint}): continue with --resume"
            if checkpoint
            else "stopped at once"
        )
        super().__init__(f"{name}: {saved}")
        self.signum, self.exit_code, self.checkpoint = signum, 128 + signum, checkpoint


class StopRequest:
    """What was asked for so far: `signum` is 0 until a signal arrives."""

    def __init__(self, *, echoes: bool = False) -> None:
        self.signum = 0
        self._echoes = echoes
        self._first = 0.0

    def receive(self, signum: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        if self.signum and not (self._echoes and time.monotonic() - self._first < _ECHO_SECONDS):
            raise Interrupted(signum)
        if not self.signum:
            self.signum, self._first = signum, time.monotonic()


@contextmanager
def catch_signals(*, echoes: bool = False) -> Iterator[StopRequest]:
    """Within the block SIGINT and SIGTERM are noted in the yielded StopRequest; afterwards the old
    handlers are back.

    echoes: a repetition within two seconds is the same request (set under torchrun). Outside the
    main thread, where Python cannot handle signals, nothing is changed.
    """
    request = StopRequest(echoes=echoes)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    old = {signum: signal.signal(signum, request.receive) for signum in _SIGNALS}
    try:
        yield request
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
