"""Continuous batching: one thread owns the engine, and texts join and leave it at every step.

    scheduler = Scheduler(model, tokenizer, slots=64)
    scheduler.start()
    scheduler.submit([Job(ids, max_tokens=100, receive=print)])

Each round of the thread admits jobs that wait, reads a piece of some prompts, and then writes one
token of every text whose prompt is read, in one forward. So a long prompt delays the others by a
segment a token, never by its length, and no text waits for another to end. Rows of an engine do not
see each other; so what a job gets does not depend on what else runs.

A job that fails fails alone: its piece has the error, and the others go on. If a forward of many
rows raises, its halves are tried, down to the row that cannot run.

Nothing here knows HTTP. Pieces are handed over by `post`, once a round.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from spectral_window.errors import ResourceError, UserError
from spectral_window.generation.decoding import Sampling, StopFilter, TextStream
from spectral_window.generation.engine import Engine, Row, RowsDivergedError
from spectral_window.serving.prefixes import Prefixes, digests

_log = logging.getLogger("spectral_window")

SEGMENT = 256  # tokens of a prompt read at once, beside others that write
READ_TOKENS = 512  # of all prompts, between two tokens of those that write
READ_COST = 64  # tokens that a forward costs at least
FIRST_SEGMENTS = 16  # so many are kept as prefixes, and later ones at powers of two
SHARE = 0.5  # of the free memory, for the states of rows
NEVER = -9999.0  # the log probability of what cannot come
COPIES = 2  # of a state: a step makes new ones before it lets the old ones go


class QueueFull(ResourceError):
    """More texts wait than may; some end soon."""


class Stopping(ResourceError):
    """The server stops, and begins no text."""


@dataclass(frozen=True)
class Scored:
    """A token and how likely the model held it.

    Attributes:
        token: its id.
        logprob: its log probability, of the model's own distribution (temperature 1); None for the
            first token of a text, which nothing precedes.
        top: the likeliest tokens with theirs, best first.
        offset: the characters of text before it.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """What one step adds to a text.

    Attributes:
        text: whole characters, possibly none.
        tokens: those of the text, where log probabilities were asked for.
        finish: None, or why this is the last piece: "stop" (end of text or a stop string) or
            "length".
        error: why there is no more, or None.
    """

    text: str = ""
    tokens: tuple[Scored, ...] = ()
    finish: str | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish is not None or self.error is not None


@dataclass(frozen=True)
class StateSize:
    """The bytes of the state of one text.

    Attributes:
        bytes: of any text.
        bytes_per_token: more for each token; 0 where the state is constant.
    """

    bytes: int
    bytes_per_token: int

    @classmethod
    def of(cls, model: Any) -> StateSize:
        """Measure a model (it goes through all of its modules)."""
        per_token = (model.state_bytes(2000) - model.state_bytes(1000)) // 1000
        return cls(model.state_bytes(1000) - 1000 * per_token, per_token)

    def after(self, tokens: int) -> int:
        """Return the bytes after so many tokens."""
        return self.bytes + self.bytes_per_token * tokens


@dataclass(eq=False)
class Job:
    """A text to write, and how far it is.

    Attributes:
        prompt: token ids; none only where `row` goes on.
        max_tokens: at most so many are drawn.
        receive: called with every piece, the last one included.
        sampling: how tokens are drawn.
        seed: of its random numbers; None for fresh ones, or those of `row`.
        stops: texts before which the output ends.
        eos: ids that end the text.
        alternatives: how many of the likeliest tokens are told for each; None tells nothing.
        score_prompt: tell the log probabilities of the prompt too, from the token `unscored` on.
            It is then read token by token.
        unscored: how many tokens at the front of the prompt are not told.
        row: a row of another engine to go on from (a session); None begins a new text.
        text: its stream of characters, where `row` has one.
        holds_characters: at a length keep half a character for the next request, not show it.
        keep: called before the last piece, off the scheduler's thread, once the prompt is read and
            the text has ended without an error; what it raises is the job's error.
        cached: how many tokens of the prompt another request had read.
        made: how many tokens were drawn.
        ended: the model wrote an end of text, now or before (a session that gets nothing to read).
    """

    prompt: Sequence[int]
    max_tokens: int
    receive: Callable[[Piece], None]
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stops: tuple[str, ...] = ()
    eos: frozenset[int] = frozenset()
    alternatives: int | None = None
    score_prompt: bool = False
    unscored: int = 0
    row: Row | None = None
    text: TextStream | None = None
    holds_characters: bool = False
    keep: Callable[[], None] | None = None
    cached: int = 0
    made: int = 0
    ended: bool = False

    def __post_init__(self) -> None:
        self.cost = 0  # bytes that its states may take
        self.cancelled = False
        self.key = b""  # names its prompt
        self.stop_filter = StopFilter(self.stops)
        self.forced: deque[int] = deque()  # of the prompt, where that is scored
        self.shown = 0  # characters that are out
        self.arrived = 0  # characters that are out or held back
        self.held: deque[Scored] = deque()  # tokens whose text is held back

    @property
    def reading(self) -> bool:
        """Whether its prompt, but for the newest token, is not yet read."""
        return self.row is not None and len(self.row.unread) > 1


class Scheduler:
    """Writes the texts of jobs, many at once, in a thread of its own.

    Args:
        model: a `SWHForCausalLM`.
        tokenizer: decodes what the rows write. Nothing else may encode with this object meanwhile.
        slots: how many texts are written at once.
        queue: how many more may wait.
        prefix_bytes: for states of prompts' beginnings.
        post: hands a call over to the thread where pieces are received; the default calls at once,
            in the scheduler's thread.
        memory: bytes for the states of all rows; None for half of what is free.

    Attributes:
        running: jobs that have a row.
        waiting: jobs that have none yet.
        prefixes: states of prompts' beginnings.
        state_size: what a text takes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        slots: int = 64,
        queue: int = 256,
        prefix_bytes: int = 256 << 20,
        post: Callable[[Callable[[], None]], None] | None = None,
        memory: int | None = None,
    ) -> None:
        self.engine = Engine(model, len(tokenizer))
        self.tokenizer = tokenizer
        self.slots, self.queue = slots, queue
        self.memory = int(SHARE * _free_memory(model.device)) if memory is None else memory
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self.prefixes = Prefixes(prefix_bytes)
        self.post = post or (lambda call: call())
        # A state that grows is copied whole by each segment, so there they are longer.
        constant = model.constant_state
        self.state_size = StateSize.of(model)
        self._segment = min(SEGMENT, model.segment) if constant else model.segment
        self._reading: deque[Job] = deque()
        self._pieces: list[tuple[Job, Piece]] = []
        self._changed = threading.Condition()
        self._stopping = self._cut = False
        self._keeping = 0  # jobs whose `keep` runs
        self._keeper = ThreadPoolExecutor(1, "keep-sessions")
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    # -- for other threads

    @property
    def stopping(self) -> bool:
        """Whether it begins no more jobs."""
        return self._stopping

    @property
    def idle(self) -> bool:
        """Whether nothing runs, waits or is being kept."""
        with self._changed:
            return not (self.running or self.waiting or self._keeping)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Add jobs, all or none; their pieces come to `Job.receive`.

        Raises:
            Stopping: `stop` was called.
            QueueFull: too many wait already.
            UserError: they could never run: there are more than slots and queue together, or a
                state exceeds the memory.
        """
        for job in jobs:
            seen = job.row.tokens_seen if job.row else 0
            length = seen + len(job.prompt) + job.max_tokens
            job.cost = COPIES * self.state_size.after(length)
            if job.cost > self.memory:
                raise UserError(
                    f"the state of {length:,} tokens takes {job.cost:,} bytes, and "
                    f"{self.memory:,} are free for states (server): ask for fewer tokens"
                )
        if len(jobs) > self.slots + self.queue:
            raise UserError(
                f"{len(jobs)} texts at once (request): this server takes "
                f"{self.slots + self.queue}; ask for fewer"
            )
        with self._changed:
            if self._stopping:
                raise Stopping("the server is stopping (server): try another, or later")
            if len(self.running) + len(self.waiting) + len(jobs) > self.slots + self.queue:
                raise QueueFull(
                    f"{len(self.waiting)} texts are waiting (server): try again in a moment"
                )
            self.waiting.extend(jobs)
            self._changed.notify_all()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs at the next step; ended ones stay as they are. A text whose prompt was read is
        kept as far as it came."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify_all()

    def stop(self, *, cut: bool = False) -> None:
        """Begin no more jobs from now on; those that are here go on to their end.

        Args:
            cut: do not wait: those that run end now with the finish "length", and those that wait
                fail.
        """
        with self._changed:
            self._stopping, self._cut = True, self._cut or cut
            self._changed.notify_all()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the thread has ended after `stop`, with all that is kept; return whether it
        has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- the thread

    def _run(self) -> None:
        while self._has_work():
            try:
                self._admit()
                self._end_cancelled()
                self._read()
                self._write([job for job in self.running if not job.reading])
            except Exception as error:  # a bug: those that run end with it, and the server goes on
                _log.error("a bug ended %d texts: %r", len(self.running), error)
                for job in list(self.running):
                    self._fail(job, error)
            self._hand_over()
        self._keeper.shutdown()

    def _has_work(self) -> bool:
        """Wait for something to do; False when there will be nothing more."""
        with self._changed:
            while not (self.waiting or self.running):
                if self._stopping and not self._keeping:
                    return False
                self._changed.wait()
            return True

    def _admit(self) -> None:
        """Give rows to jobs that wait, in their order, while there are slots and memory."""
        with self._changed:
            if self._cut:
                for job in self.waiting:
                    self._pieces.append((job, Piece(error=Stopping("the server has stopped"))))
                self.waiting.clear()
            gone = [job for job in self.waiting if job.cancelled]
            for job in gone:
                self.waiting.remove(job)
                self._pieces.append((job, Piece(finish="length")))
            admitted, taken = [], sum(job.cost for job in self.running)
            while self.waiting and len(self.running) < self.slots:
                taken += self.waiting[0].cost
                if taken > self.memory and self.running:
                    break
                job = self.waiting.popleft()
                self.running.append(job)
                admitted.append(job)
        for job in admitted:
            try:
                self._begin(job)
            except Exception as error:  # an id or a setting that the engine refuses
                self._fail(job, error)

    def _begin(self, job: Job) -> None:
        """Make the row of a job."""
        if job.text is None:
            job.text = TextStream(self.tokenizer)
        if job.row is None:
            job.row = self.engine.add((), job.sampling, seed=job.seed)
        else:
            self.engine.adopt(job.row)
            job.row.sampling = job.sampling
            if job.seed is not None:
                job.row.reseed(job.seed)
        if job.score_prompt:
            first, *rest = job.prompt
            self.engine.extend(job.row, [first])
            job.forced.extend(rest)
            if not job.unscored:
                job.held.append(Scored(first, None, (), 0))
                job.arrived += len(job.text.push(first))
            self._tell_prompt(job)
        elif job.prompt:
            self.engine.extend(job.row, job.prompt)
            job.text.skip(job.prompt)
            if job.row.state_seen == 0:
                (job.key,) = digests(job.prompt, [len(job.prompt)])
        if job.reading:
            self._reading.append(job)

    def _end_cancelled(self) -> None:
        """End what nobody waits for any more, or all at a cut."""
        for job in list(self.running):
            if self._cut or job.cancelled:
                self._finish(job, "length")

    def _read(self) -> None:
        """Read segments of prompts, in turns, up to `READ_TOKENS`."""
        left = READ_TOKENS
        for _ in range(len(self._reading)):
            if left <= 0:
                break
            job = self._reading.popleft()
            if job not in self.running:
                continue
            try:
                left -= max(self._read_segment(job), READ_COST)
            except Exception as error:  # no memory for this prompt, say
                self._fail(job, error)
                continue
            if job.reading:
                self._reading.append(job)

    def _read_segment(self, job: Job) -> int:
        """Read one segment of a prompt, or take a state that another has read; return how many
        tokens were read."""
        row = job.row
        assert row is not None
        fresh = bool(job.key) and self.prefixes.capacity > 0
        if fresh and row.state_seen == 0:
            leads = next(other for other in self.running if other.key == job.key)
            if leads is not job and leads.reading:
                return 0  # the same prompt is being read: wait for its state
            found = self.prefixes.find(job.prompt)
            if found is not None:
                job.cached, states = found
                with self.engine.all_or_nothing([row]):
                    self.engine.restore(row, states, job.cached)
                    self.engine.extend(row, job.prompt[job.cached :])
                if not job.reading:
                    return 0
        # Segments end at multiples of their size, where other prompts' end too.
        before = row.state_seen
        self.engine.prefill(row, self._segment - before % self._segment)
        if fresh and self._worth_keeping(row.state_seen, len(job.prompt)):
            self.prefixes.keep(job.prompt, row.state_seen, row.states)
        return row.state_seen - before

    def _worth_keeping(self, seen: int, length: int) -> bool:
        """Whether to keep the state after `seen` tokens of a prompt: at its end, after each of the
        first segments, and then after twice as many each time."""
        segments, rest = divmod(seen, self._segment)
        early = segments <= FIRST_SEGMENTS or segments & (segments - 1) == 0
        return seen == length - 1 or (not rest and early)

    def _write(self, jobs: list[Job]) -> None:
        """Write one token of each job."""
        for job in jobs:
            if job.made >= job.max_tokens and not job.forced:
                self._finish(job, "length")
            elif job.ended:
                self._finish(job, "stop")
        jobs = self._step([job for job in jobs if job in self.running])
        for job in [job for job in jobs if job.forced]:
            self._force(job)
        drawing = [job for job in jobs if not job.forced and job.row and job.row.logits is not None]
        for job, token in self._sample(drawing):
            try:
                self._append(job, token)
            except Exception as error:  # a tokenizer that cannot decode, say
                self._fail(job, error)

    def _step(self, jobs: list[Job]) -> list[Job]:
        """Run the newest token of each job; return those that have logits. The others failed."""
        try:
            self.engine.step([job.row for job in jobs if job.row])
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return []
            half = len(jobs) // 2
            return self._step(jobs[:half]) + self._step(jobs[half:])
        return jobs

    def _sample(self, jobs: list[Job]) -> list[tuple[Job, int]]:
        """Draw a token for each job; those whose logits are not finite fail."""
        rows = [job.row for job in jobs if job.row]
        try:
            return list(zip(jobs, self.engine.sample(rows), strict=True))
        except RowsDivergedError as error:
            bad = set(error.rows)
            for job in jobs:
                if job.row in bad:
                    self._fail(job, RowsDivergedError([job.row]))
            return self._sample([job for job in jobs if job.row not in bad])

    def _force(self, job: Job) -> None:
        """Take the next token of a prompt that is scored."""
        row, text = job.row, job.text
        assert row is not None
        assert row.logits is not None
        assert text is not None
        token = job.forced.popleft()
        job.held.append(_score(row.logits, token, job.alternatives or 0, job.arrived))
        self.engine.extend(row, [token])
        job.arrived += len(text.push(token))
        self._tell_prompt(job)

    def _tell_prompt(self, job: Job) -> None:
        """Hand over the tokens of a prompt that is scored to its end. Its text is not: whoever
        asked has it."""
        if not job.forced:
            job.shown = job.arrived
            self._pieces.append((job, Piece("", self._released(job, everything=True))))

    def _append(self, job: Job, token: int) -> None:
        """Add a drawn token to its row and its text."""
        row, text = job.row, job.text
        assert row is not None
        assert row.logits is not None
        assert text is not None
        job.made += 1
        if token in job.eos:
            # A signal and not a part of the text: the state never sees it, so a session can go on.
            job.ended = True
            self._finish(job, "stop")
            return
        if job.alternatives is not None:
            job.held.append(_score(row.logits, token, job.alternatives, job.arrived))
        self.engine.extend(row, [token])
        shown = self._show(job, text.push(token))
        if job.stop_filter.stop is not None:
            self._finish(job, "stop", shown)
        elif job.made >= job.max_tokens:
            self._finish(job, "length", shown)
        else:
            self._pieces.append((job, Piece(shown, self._released(job))))

    def _show(self, job: Job, arrived: str) -> str:
        """Return the text that may go out, of what has `arrived`."""
        job.arrived += len(arrived)
        free = job.stop_filter.push(arrived)
        job.shown += len(free)
        return free

    def _released(self, job: Job, everything: bool = False) -> tuple[Scored, ...]:
        """Take the tokens whose text has begun to go out."""
        tokens = []
        while job.held and (everything or job.held[0].offset < job.shown):
            tokens.append(job.held.popleft())
        return tuple(tokens)

    def _finish(self, job: Job, finish: str, shown: str = "") -> None:
        """End a job: its last piece, with what was held back, after it is kept."""
        stops, text, row = job.stop_filter, job.text, job.row
        assert text is not None
        assert row is not None
        if stops.stop is None:
            if not (job.holds_characters and finish == "length"):
                shown += self._show(job, text.finish())
            if stops.stop is None:
                rest = stops.finish()
                job.shown += len(rest)
                shown += rest
            else:
                finish = "stop"
        piece = Piece(shown, self._released(job, stops.stop is None), finish)
        self._leave(job)
        if job.keep is None or len(row.unread) > 1:
            self._pieces.append((job, piece))
            return
        with self._changed:
            self._keeping += 1
        self._keeper.submit(self._keep, job, piece)

    def _keep(self, job: Job, piece: Piece) -> None:
        """Call `keep` in the thread for that, then hand over the last piece."""
        assert job.keep is not None
        try:
            job.keep()
        except Exception as error:  # a full disk, say
            piece = Piece(error=error)
        self._post([(job, piece)])
        with self._changed:
            self._keeping -= 1
            self._changed.notify_all()

    def _fail(self, job: Job, error: Exception) -> None:
        self._leave(job)
        self._pieces.append((job, Piece(error=error)))

    def _leave(self, job: Job) -> None:
        with self._changed:
            self.running.remove(job)
        if job.row in self.engine.rows:
            self.engine.drop(job.row)

    def _hand_over(self) -> None:
        if self._pieces:
            self._post(self._pieces)
            self._pieces = []

    def _post(self, pieces: list[tuple[Job, Piece]]) -> None:
        def receive() -> None:
            for job, piece in pieces:
                job.receive(piece)

        self.post(receive)


def _score(logits: Tensor, token: int, alternatives: int, offset: int) -> Scored:
    """Score a token by the logits `[V]` it was drawn from."""
    # A token that the model forbids has -inf, which JSON cannot say: OpenAI writes -9999.
    logprobs = logits.double().log_softmax(-1).clamp_min(NEVER)
    best = logprobs.topk(min(alternatives, len(logprobs))) if alternatives else None
    top = () if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Scored(token, float(logprobs[token]), tuple(top), offset)


def _free_memory(device: torch.device) -> int:
    """Return the bytes that are free where states live."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
