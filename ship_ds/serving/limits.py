"""How much a server does at once, and how long it lets anybody wait. Every bound of it is here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Args:
        max_rows: Answers that are written at once; the free memory may allow fewer.
        max_waiting: Requests that wait for the model; more get a 429.
        wait_seconds: How long one of them waits for its turn at most; then it gets a 503.
        max_connections: Open at a time; further ones get a 503.
        head_seconds: In which a request has to begin and its head to arrive, on a new connection
            or one that was answered; then it is closed.
        max_body_bytes: Of a request; a larger one gets a 413.
        max_upload_bytes: Of a request with an adapter in base64, one at a time.
        body_seconds: In which a request's body has to arrive.
        max_rows_per_request: Prompts times choices of one request.
        max_new_tokens: That one answer may have, where the model's context allows more.
        max_cached: Instructions and examples that are remembered with their latents.
        max_cached_bytes: Of all of these together.
        max_names: Adapters registered by name at a time.
    """

    max_rows: int = 64
    max_waiting: int = 256
    wait_seconds: float = 60.0
    max_connections: int = 512
    head_seconds: float = 15.0
    max_body_bytes: int = 1 << 20
    max_upload_bytes: int = 44 << 20
    body_seconds: float = 30.0
    max_rows_per_request: int = 64
    max_new_tokens: int = 4096
    max_cached: int = 10_000
    max_cached_bytes: int = 64 << 20
    max_names: int = 1000
