"""How large a job may be unless told otherwise."""

MAX_JOB_ROWS = 10_000_000
MAX_JOB_BYTES = 64 * 2**30
"""Of lines."""
