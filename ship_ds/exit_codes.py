"""What a program of this package ends with, for shells and schedulers. Imports nothing."""

BAD_INPUT = 2
"""One line said what to change."""
PREEMPTED = 75
"""Asked to stop; everything is saved: start the same command again (EX_TEMPFAIL of sysexits.h)."""
HUNG = 76
"""No step for training.hang_minutes; goes on from the last checkpoint."""
NOT_SAVED_IN_TIME = 77
"""Asked to stop, but no step boundary or no checkpoint came within training.grace_seconds."""
INTERRUPTED = 130
"""By SIGINT, as shells have it."""
