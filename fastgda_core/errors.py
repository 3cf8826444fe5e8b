"""The error hierarchy: what a runner must do about a failure.

`UsageError`: tell the person and stop. `BadSample`: quarantine the sample and go on.
`TransientError`: retry with backoff. Anything else is a bug and fails at once.
"""


class UsageError(ValueError):
    """The request cannot be carried out as given; the message says how to mend it."""


class BadSample(ValueError):
    """One sample from outside is unusable; it is named, skipped and counted."""


class TransientError(RuntimeError):
    """A failure that may pass by itself; the unit of work is tried again."""
