"""The one thread that has the model: streams come and go between its steps, whoever asked for them.

Requests are asyncio's, in the server's thread. A job passes between the two: the worker puts pieces of text into it and
rings; the request takes all that is there. So a reader who is slow makes nobody wait: his pieces are fewer and longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from miaobi.console import log, warn
from miaobi.errors import UserError
from miaobi.generate.engine import LanguageModel
from miaobi.generate.stream import Stream
from miaobi.serve.errors import APIError
from miaobi.serve.metrics import Metrics
from miaobi.serve.text import Piece, Writer

PACE = (
    0.04  # seconds between what a stream sends: what comes sooner goes out together, or each would cost the model time
)
QUIET = 15.0  # seconds without a piece, after which a stream says that it is still there


@dataclass(eq=False)
class Choice:
    """One text that a request asks for."""

    index: int
    make: Callable[[], Stream]
    """Its stream, made when it gets a slot."""
    writer: Writer
    is_scored_only: bool = False
    """The prompt is scored and nothing written."""
    stream: Stream | None = None


@dataclass(eq=False)
class Job:
    """What a request asks for, and what there is of it."""

    choices: list[Choice]
    seconds: float
    """It may take so long."""
    is_streamed: bool = True
    """Whether the request wants pieces; else it is called when all is there."""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    bell: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    pieces: deque[Piece] = field(default_factory=deque)
    error: APIError | None = None
    began: float = field(default_factory=time.perf_counter)
    waits: bool = False
    """Whether the request wants to be woken; not while it sends."""
    over: bool = False
    first: float | None = None
    """Seconds until the first token."""

    def __post_init__(self) -> None:
        self.unfinished = len(self.choices)

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return sum(choice.writer.count for choice in self.choices)

    @property
    def recalled(self) -> int:
        """Tokens of the prompt that were known from others."""
        return sum(choice.stream.recalled for choice in self.choices if choice.stream is not None)

    def ring(self) -> None:
        """In the worker: there is something to take."""
        if self.waits:
            self.waits = False
            self.wake(self.bell)

    def wake(self, event: asyncio.Event) -> None:
        """In the worker: set what the request waits for."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(event.set)

    def finish(self, error: APIError | None = None) -> None:
        """In the worker: nothing more comes."""
        self.error, self.over = error, True
        self.wake(self.bell)
        self.wake(self.ended)

    async def taken(self) -> AsyncIterator[list[Piece]]:
        """All that is there, each `PACE` again until nothing more comes; an empty list where nothing came for long.

        Raises APIError where the worker could not go on.
        """
        over = False
        while not over:
            self.bell.clear()
            self.waits = True  # first this, then a look: what is put in afterwards rings
            if not (self.pieces or self.over):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.bell.wait(), QUIET)
            self.waits = False
            over, found = self.over, []  # in this order: what comes in between is found the next time
            while self.pieces:
                found.append(self.pieces.popleft())
            if found or not over:
                yield found
            if not over:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.ended.wait(), PACE)
        if self.error is not None:
            raise self.error


class Worker(threading.Thread):
    """Writes the texts of jobs, as many at a time as there are slots."""

    def __init__(self, lm: LanguageModel, size: int, max_queue: int, metrics: Metrics) -> None:
        super().__init__(name="worker", daemon=True)
        self.lm, self.size, self.max_queue, self.metrics = lm, size, max_queue, metrics
        self.changed = threading.Condition()
        self.waiting: deque[tuple[Job, Choice]] = deque()
        self.leaving: set[Job] = set()
        self.active: dict[Stream, tuple[Job, Choice]] = {}
        self.closed = False
        self.slots = lm.slots(size)
        self.slots.reserve(min(lm.model.cfg.block_size, 2048))  # once and for all, where blocks are small
        metrics.workers.append(self)

    # Called by requests

    def submit(self, job: Job) -> None:
        """Let the job's texts be written. Raises APIError where too many wait."""
        with self.changed:
            if self.closed:
                raise APIError(503, "the server is shutting down", "shutting_down")
            there = len(self.active) + len(self.waiting)
            if there and there + len(job.choices) > self.size + self.max_queue:
                self.metrics.refused.inc()
                raise APIError(429, f"{there} texts are being written or wait; try again soon", "queue_full",
                               headers={"Retry-After": str(self.metrics.patience(there / self.size))})  # fmt: skip
            self.waiting.extend((job, choice) for choice in job.choices)
            self.changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for the job any more."""
        if not job.over:
            with self.changed:
                self.leaving.add(job)
                self.changed.notify()

    def close(self) -> None:
        """Take no more jobs, and end when those that there are have ended."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    # The thread

    def run(self) -> None:
        """Step after step, until closed."""
        while True:
            with self.changed:
                while not (self.waiting or self.active or self.leaving or self.closed):
                    self.changed.wait()
                if self.closed and not (self.waiting or self.active):
                    return
                self.leave()
                self.admit()
            if self.active:
                self.step()

    def leave(self) -> None:
        """Free what cancelled jobs have, and end the texts whose time is over."""
        gone, self.leaving = self.leaving, set()
        now = time.perf_counter()
        if gone:
            self.waiting = deque(item for item in self.waiting if item[0] not in gone)
        while self.waiting and now > self.waiting[0][0].began + self.waiting[0][0].seconds:
            job, _ = self.waiting.popleft()
            if not job.over:
                job.finish(APIError(503, "no slot became free in time; try again later", "timeout"))
        for stream, (job, choice) in list(self.active.items()):
            if job in gone or job.over:
                self.free(stream)
            elif now > job.began + job.seconds:
                choice.writer.end("length")
                self.hand_over(stream, job, choice)
        for job in gone:
            job.over = True

    def admit(self) -> None:
        """Slots for those who wait longest."""
        while self.waiting and self.slots.free:
            job, choice = self.waiting.popleft()
            if job.over:
                continue
            choice.stream = choice.make()
            self.slots.add(choice.stream)
            self.active[choice.stream] = job, choice

    def step(self) -> None:
        """One step of all, and what it gave to whom."""
        try:
            drawn = self.slots.advance()
        except Exception as e:  # memory, mostly; the next ones must not suffer for it
            self.fail(e)
            return
        for stream, token in drawn:
            if (found := self.active.get(stream)) is None:
                continue
            _, choice = found
            if choice.is_scored_only:
                choice.writer.end("length")
            elif not choice.writer.finish:
                choice.writer.take(token, stream.scores.pop(0) if stream.scores else None)
        for stream in {stream: None for stream, _ in drawn}:
            if (found := self.active.get(stream)) is not None:
                if not stream.left:
                    found[1].writer.end("length")
                self.hand_over(stream, *found)

    def hand_over(self, stream: Stream, job: Job, choice: Choice) -> None:
        """What is ready of a text to its request; its slot to the next, where it has ended."""
        if job.first is None:
            job.first = time.perf_counter() - job.began
            self.metrics.first_token.observe(job.first)
        writer, ended = choice.writer, choice.writer.finish is not None
        if not (ended or job.is_streamed):
            return
        text, tokens = writer.ready()
        if text or tokens or ended:
            job.pieces.append(Piece(choice.index, text, tokens, writer.finish))
        if ended:
            self.free(stream)
            job.unfinished -= 1
            self.metrics.wrote(stream, writer.count)
            if not job.unfinished:
                self.metrics.took(job)
                job.finish()
        if job.is_streamed and job.pieces:
            job.ring()

    def free(self, stream: Stream) -> None:
        """A slot."""
        self.slots.end(stream)
        del self.active[stream]

    def fail(self, error: Exception) -> None:
        """Tell all who are being written that it went wrong, and begin with empty slots."""
        warn(f"a step failed: {type(error).__name__}: {str(error)[:300]}")
        why = "the model could not go on; the server's log says why"
        if isinstance(error, UserError):  # it says what to do, and is no fault of this program
            why = str(error)
        else:
            log("".join(traceback.format_exception(error)))
        jobs, self.active = {job for job, _ in self.active.values()}, {}
        for job in jobs:
            job.finish(APIError(500, why, "internal_error"))
        self.slots = self.lm.slots(self.size)
