"""What a server tells Prometheus at `/metrics`."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one server. No label holds what a client wrote: their number is bounded."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ship_requests",
            "Answered requests",
            ["route", "code"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "ship_prompt_tokens", "Tokens read before answers", registry=self.registry
        )
        self.new_tokens = Counter("ship_new_tokens", "Tokens of answers", registry=self.registry)
        self.seconds_to_first_token = Histogram(
            "ship_seconds_to_first_token",
            "From a request's arrival to the first token of its answer",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.rows_a_forward = Histogram(
            "ship_rows_a_forward",
            "Answers that grow in one forward of the Task LLM",
            registry=self.registry,
            buckets=_ROWS,
        )
        self.waiting = Gauge(
            "ship_waiting_requests", "Requests that wait for the model", registry=self.registry
        )
        self.running = Gauge(
            "ship_running_rows", "Answers that are being written", registry=self.registry
        )
        self.cached = Gauge(
            "ship_cached_adapters",
            "Instructions and examples whose latents are kept",
            registry=self.registry,
        )
        self.cached_bytes = Gauge("ship_cached_bytes", "What these take", registry=self.registry)
        self.made = Counter(
            "ship_made_adapters", "Instructions and examples encoded", registry=self.registry
        )

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
