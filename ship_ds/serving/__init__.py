"""`ship-ds serve`: an OpenAI-compatible server over a run."""

PREFIX = "ship:"
"""Before an instruction in place of a model's name, here and under vLLM."""
