"""Metrics and the report of a run."""
