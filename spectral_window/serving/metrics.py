"""What /metrics shows, in the format of Prometheus: requests, tokens, rows, queue, first tokens."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from spectral_window.serving.scheduler import Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The numbers of one server, in a registry of its own.

    Args:
        scheduler: whose rows and queue are shown.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()

        def named(kind: Any, name: str, text: str, **options: object) -> Any:
            return kind(f"spectral_window_{name}", text, registry=self.registry, **options)

        self.requests: Counter = named(
            Counter, "requests", "Requests answered.", labelnames=("route", "status")
        )
        self.prompt_tokens: Counter = named(
            Counter, "prompt_tokens", "Tokens of prompts, those read before included."
        )
        self.cached_tokens: Counter = named(
            Counter, "cached_prompt_tokens", "Tokens of prompts that another request had read."
        )
        self.completion_tokens: Counter = named(Counter, "completion_tokens", "Tokens written.")
        self.first_token: Histogram = named(
            Histogram,
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=SECONDS,
        )
        for name, text, read in (
            ("rows_running", "Texts being written.", lambda: len(scheduler.running)),
            ("rows_waiting", "Texts in the queue.", lambda: len(scheduler.waiting)),
            ("prefix_bytes", "Bytes of kept prefixes.", lambda: scheduler.prefixes.bytes),
        ):
            gauge: Gauge = named(Gauge, name, text)
            gauge.set_function(read)

    def answered(self, route: str, status: int) -> None:
        """Count an answer."""
        self.requests.labels(route, str(status)).inc()

    def show(self) -> bytes:
        """Return all of it as text."""
        return generate_latest(self.registry)
