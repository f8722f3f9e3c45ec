"""What GET /metrics tells Prometheus."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from miaobi.generate.stream import Stream
    from miaobi.serve.worker import Job, Worker

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        where = {"registry": self.registry}
        self.requests = Counter("miaobi_requests", "Answers.", ("path", "status"), **where)
        self.tokens = Counter(
            "miaobi_tokens", "Tokens: read of prompts, recalled of prompts, written.", ("kind",), **where
        )
        self.refused = Counter("miaobi_queue_full", "Requests that found too many waiting.", **where)
        self.gone = Counter("miaobi_disconnects", "Clients that went away before the end.", **where)
        self.first_token = Histogram("miaobi_time_to_first_token_seconds", "From request to first token.",
                                     buckets=SECONDS, **where)  # fmt: skip
        self.per_token = Histogram("miaobi_time_per_output_token_seconds", "Between tokens of a text.",
                                   buckets=(0.001, 0.0025, 0.005, *SECONDS[:8]), **where)  # fmt: skip
        self.request_seconds = Histogram("miaobi_request_seconds", "From request to last token.", buckets=SECONDS,
                                         **where)  # fmt: skip
        self.mean = 1.0  # seconds of a request, of late
        self.workers: list[Worker] = []
        for name, what, count in (
            ("running", "Texts being written.", lambda worker: len(worker.active)),
            ("waiting", "Texts that wait for a slot.", lambda worker: len(worker.waiting)),
            ("slots", "Texts that can be written at once.", lambda worker: worker.size),
        ):
            Gauge(f"miaobi_texts_{name}", what, **where).set_function(lambda count=count: sum(map(count, self.workers)))
        for kind in ("prompt", "recalled", "written"):
            self.tokens.labels(kind)

    def wrote(self, stream: Stream, tokens: int) -> None:
        """A text has ended."""
        self.tokens.labels("prompt").inc(stream.prompt - stream.recalled)
        self.tokens.labels("recalled").inc(stream.recalled)
        self.tokens.labels("written").inc(tokens)

    def took(self, job: Job) -> None:
        """A request has ended."""
        seconds, tokens = time.perf_counter() - job.began, max(choice.writer.count for choice in job.choices)
        self.request_seconds.observe(seconds)
        self.mean += (seconds - self.mean) / 8
        if tokens > 1:
            self.per_token.observe((seconds - job.first) / (tokens - 1))

    def patience(self, rounds: float) -> int:
        """Seconds after which it is worth to try again, where so many rounds of texts come first."""
        return min(60, max(1, math.ceil(self.mean * rounds)))

    def text(self) -> bytes:
        """Prometheus' format."""
        return generate_latest(self.registry)
