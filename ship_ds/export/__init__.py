"""Out of the trainer: what other software loads."""
