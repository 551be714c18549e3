"""Ctrl-C and SIGTERM: save first, then stop; asked again, stop at once.

While a model trains a signal only sets a note; the training loop looks at it between two steps,
saves a checkpoint and leaves, so nothing is ever half done. A second signal raises where the
program stands. Everywhere else in a command the first one raises.

One request often arrives as several signals: `timeout` and a terminal signal the whole process
group, and a launcher such as torchrun passes on what its children already got. So whatever comes
within a second of the first is the same request.

What a signal handler raises can be lost: inside a destructor or a weak reference's callback (an
import ends with one) Python prints the exception and goes on. So the request is also noted, and
one that was lost is made again a moment later.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST_SECONDS = 1.0
AGAIN_SECONDS = 0.05  # until a lost request is made again: by then its callback has ended

_asked = 0  # the signal that `raise_on_signals` met


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived where nothing is to be saved."""

    exit_code = 143


class Interrupted(KeyboardInterrupt):
    """Training stopped because of a signal.

    `exit_code` is 130 (SIGINT) or 143 (SIGTERM); `checkpoint` is the folder to resume from, or None
    if it was stopped at once. With a checkpoint it is a pause, and reads like one. todo: how to go
    on, in words. step: the last step that is in the checkpoint.
    """

    def __init__(
        self, signum: int, checkpoint: Path | None = None, todo: str = "", step: int = 0
    ) -> None:
        name = signal.Signals(signum).name
        what = f"stopped at step {step}" if checkpoint else f"{name}: stopped at once"
        super().__init__("; ".join(part for part in (what, todo) if part))
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
    if _asked:  # and what it raised was lost
        request.receive(_asked)
    try:
        yield request
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Within the block, a whole command, SIGTERM raises Terminated and SIGINT KeyboardInterrupt, so
    that temporary files are removed on the way out; a request that was lost is made again.

    Afterwards all is as before. Outside the main thread nothing changes.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    again: list[threading.Timer] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        global _asked
        _asked = signum
        raise Terminated("terminated") if signum == signal.SIGTERM else KeyboardInterrupt

    def lost(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if not isinstance(error, KeyboardInterrupt):
            return told(unraisable)
        signum = getattr(error, "exit_code", 128 + signal.SIGINT) - 128
        timer = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signum))
        timer.daemon = True
        again.append(timer)
        return timer.start()

    told, sys.unraisablehook = sys.unraisablehook, lost
    old = {signal.SIGTERM: signal.signal(signal.SIGTERM, receive)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored
        old[signal.SIGINT] = signal.signal(signal.SIGINT, receive)
    try:
        yield
    finally:
        for timer in again:
            timer.cancel()
        sys.unraisablehook = told
        for signum, handler in old.items():
            signal.signal(signum, handler)
        _asked = 0


def asked() -> int:
    """The signal that asked the running command to end, or 0."""
    return _asked
