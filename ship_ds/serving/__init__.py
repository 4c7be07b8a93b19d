"""`ship-ds serve`: an OpenAI-compatible server over a run."""
