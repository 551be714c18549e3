"""Which processes of a run still answer, asked when a collective fails.

A collective that fails says "connection reset" or "timed out", and not whose fault it is: when one
process dies, its neighbours fail first, and theirs after them. So every process also answers from
a thread, by a key-value store that all of them reach: torchrun's, which outlives the processes.
Nothing is written while all is well, but for one question a second: is there a roll call?

    meet     all processes are there, and were started with the same settings
    call     who answers, from which step, and whether it waits in vain too
    tell     the error by which this process ends, for those that it leaves behind
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from spectral_window.errors import NetworkError, SpectralWindowError, UserError, from_exit_code

MEETING_SECONDS = 300.0  # processes start and import at different speeds
ANSWER_SECONDS = 3.0  # of a roll call: a process that lives answers within a second
_POLL_SECONDS = 0.05
_LISTEN_SECONDS = 1.0


class Answer(NamedTuple):
    """One process's answer: the step it is at, and whether a collective failed in it too."""

    step: int
    failed: bool


class RollCall:
    """The processes of a run, `rank` one of `size`, in a store that all of them reach.

    Args:
        store: the store; keys of this class are all below "roll".
        where: its address, for messages.
        rank: this process.
        size: how many there are.
    """

    def __init__(self, store: dist.Store, where: str, rank: int, size: int) -> None:
        self._store, self._where = dist.PrefixStore("roll", store), where
        self._rank, self._size = rank, size
        self._leaving = threading.Event()
        self._threads = [threading.Thread(target=self._listen, daemon=True)]
        self.step = 0  # the step in work, from 1; 0 before the first

    # ---------------------------------------------------------------------------------- the start

    def meet(self, settings: dict[str, Any]) -> str:
        """Return when every process is here, and begin to listen.

        torchrun's store still holds the keys of processes that it has replaced, and counts restarts
        for each machine alone. So rank 0 proposes a list of those who said hello, under a number
        that was never used; each confirms the entry that is its own and no predecessor's; and when
        all have, the number holds. Until then a new hello makes a new list.

        Args:
            settings: JSON values that must be the same in all processes.

        Returns:
            A prefix for keys that no earlier processes have used.

        Raises:
            NetworkError: one did not come within `MEETING_SECONDS`.
            UserError: they were started with different settings; raised in every process.
        """
        text = json.dumps(settings, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self._store.set(f"settings/{digest}", text)
        self._store.set(f"hello/{self._rank}", f"{uuid.uuid4().hex} {digest}")
        number = self._lead() if self._rank == 0 else self._follow()
        digests = [hello.split()[1] for hello in self._list(number)]
        other = next((r for r, each in enumerate(digests) if each != digests[0]), None)
        if other is not None:
            pair = [json.loads(self._store.get(f"settings/{digests[r]}")) for r in (0, other)]
            # Without torchrun the first process holds the store, and must outlast the readers.
            read = f"read/{number}"
            self._store.add(read, 1)
            self._wait(lambda: self._store.add(read, 0) == self._size, ANSWER_SECONDS)
            raise UserError(
                f"rank {other} was started with other settings than rank 0 "
                f"({_first_difference(*pair)}): start all processes by the same command"
            )
        self._store = dist.PrefixStore(number, self._store)  # what follows is of these processes
        self._threads[0].start()
        return number

    def _lead(self) -> str:
        """Propose lists until every process has confirmed one; return its number."""
        hellos: list[str | None] = []
        number = ""

        def settled() -> bool:
            nonlocal hellos, number
            said: list[str | None] = [self._read(f"hello/{r}") for r in range(self._size)]
            if None not in said and said != hellos:
                hellos, number = said, str(self._store.add("numbers", 1))
                self._store.set(f"list/{number}", json.dumps(hellos))
                self._store.set("newest", number)
            return bool(number) and not self._missing(number)

        if not self._wait(settled, MEETING_SECONDS):
            raise self._nobody(self._missing(number))
        self._store.set(f"settled/{number}", "")
        return number

    def _follow(self) -> str:
        """Confirm lists that hold this process until one is settled; return its number."""
        mine = self._read(f"hello/{self._rank}")
        confirmed: str | None = None

        def settled() -> bool:
            nonlocal confirmed
            number = self._read("newest")
            if number is not None and number != confirmed and mine in self._list(number):
                self._store.set(f"confirmed/{number}/{self._rank}", "")
                confirmed = number
            return confirmed is not None and self._store.check([f"settled/{confirmed}"])

        if not self._wait(settled, MEETING_SECONDS):
            raise self._nobody(self._missing(confirmed or "") or [0])
        return str(confirmed)

    def _list(self, number: str) -> list[str]:
        return json.loads(self._store.get(f"list/{number}"))

    def _missing(self, number: str) -> list[int]:
        """Who has not confirmed the list, or said hello where there is none."""
        keys = [f"confirmed/{number}/{r}" if number else f"hello/{r}" for r in range(self._size)]
        return [r for r in range(1, self._size) if not self._store.check([keys[r]])]

    def _nobody(self, missing: list[int]) -> NetworkError:
        return NetworkError(
            f"{_ranks(missing)} of {self._size} did not start within {MEETING_SECONDS:.0f} s "
            f"({self._where}): start all processes with torchrun"
        )

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    @staticmethod
    def _wait(ready: Callable[[], bool], seconds: float) -> bool:
        """Whether `ready()` within `seconds`. Signals are handled meanwhile, which they are not in
        the store's own wait."""
        until = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    # ------------------------------------------------------------------------------------ the end

    def tell(self, code: int, line: str) -> None:
        """Leave word that this process ends with exit code `code`, and why."""
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._store.set(f"end/{self._rank}", json.dumps([code, " ".join(line.split())[:300]]))

    def leave(self) -> None:
        """Stop listening. A thread that comes back while the interpreter ends would abort it."""
        self._leaving.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(1.0)  # longer only where the store does not answer

    # ------------------------------------------------------------------------------------ between

    def _listen(self) -> None:
        try:
            while not self._leaving.wait(_LISTEN_SECONDS):
                if self._store.check(["call"]):
                    return self._answer(failed=False)
        except RuntimeError:  # the store is gone, with the process that held it
            return None

    def _answer(self, failed: bool) -> None:
        if failed or not self._store.check([f"answer/{self._rank}"]):
            self._store.set(f"answer/{self._rank}", json.dumps(Answer(self.step, failed)))

    def call(self, timeout: int) -> SpectralWindowError:
        """Find out who made a collective fail in this process.

        Args:
            timeout: how long that collective waited at most, in seconds, for the message.

        Returns:
            The error that names them: of the class of the error that ended one of them, if that is
            known, else a NetworkError.
        """
        answers: dict[int, Answer] = {}
        ends: dict[int, tuple[int, str]] = {}
        # In a thread of its own: a store behind a cut link blocks whoever asks it.
        asking = threading.Thread(target=self._ask, args=(answers, ends), daemon=True)
        self._threads.append(asking)
        asking.start()
        asking.join(2 * ANSWER_SECONDS)
        at = f"at step {self.step}" if self.step else "before the first step"
        if ends:
            rank, (code, line) = min(ends.items())
            return from_exit_code(code, f"rank {rank} of {self._size} ended {at}: {line}")
        absent = [rank for rank in range(self._size) if rank not in answers]
        idle = [rank for rank, answer in answers.items() if not answer.failed]
        if not answers:
            what = f"rank {self._rank} lost the others {at}: {self._where} does not answer"
        elif absent:
            what = (
                f"rank {self._rank} lost {_ranks(absent)} of {self._size} {at}: ended, hangs or "
                "out of reach"
            )
        elif idle:
            steps = ", ".join(str(step) for step in sorted({answers[r].step for r in idle}))
            what = (
                f"rank {self._rank} waited in vain for {_ranks(sorted(idle))} of {self._size} {at}:"
                f" busy in step {steps}"
            )
        else:
            what = f"rank {self._rank} lost its connections {at}: all {self._size} ranks still run"
        return NetworkError(
            f"{what}; go on with --resume, and where one was only slow, with a larger "
            f"collective_timeout (it is {timeout} s)"
        )

    def _ask(self, answers: dict[int, Answer], ends: dict[int, tuple[int, str]]) -> None:
        """Fill in who answers and who told its end, until all failed alike or time is up."""
        until = time.monotonic() + ANSWER_SECONDS
        try:
            self._answer(failed=True)
            self._store.set("call", "")
            while True:
                for rank in range(self._size):
                    if (end := self._read(f"end/{rank}")) is not None:
                        code, line = json.loads(end)
                        ends[rank] = code, line
                    if rank in answers and answers[rank].failed:
                        continue
                    if (answer := self._read(f"answer/{rank}")) is not None:
                        answers[rank] = Answer(*json.loads(answer))
                done = len(answers) == self._size and all(a.failed for a in answers.values())
                if ends or done or time.monotonic() > until or self._leaving.wait(_POLL_SECONDS):
                    return
        except RuntimeError:  # the store is gone: what was heard so far counts
            return


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    for key in sorted(ours | theirs):
        if ours.get(key) != theirs.get(key):
            return f"{key} is {ours.get(key)!r} and {theirs.get(key)!r}"
    return "their order"
