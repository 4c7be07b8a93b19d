"""Metrics and the report of a run."""

ENDPOINT_URL = "http://localhost:8000/v1"
"""Of an OpenAI-compatible server where none is named: where vLLM's listens. Here, so that a command
line reads it without the settings of an evaluation."""
