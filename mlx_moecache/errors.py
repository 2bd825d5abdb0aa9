"""The errors that the library raises.

Every message says what was wrong, what was allowed and what to do next. Command modules print it as one line
on stderr and exit with code 2; anything else that escapes is a bug.
"""


class MoeCacheError(Exception):
    """Base class of all errors raised on purpose by mlx_moecache."""


class UsageError(MoeCacheError):
    """An argument or option has a value that is not allowed."""


class HubError(MoeCacheError):
    """A model could not be fetched from the Hugging Face hub, or a path does not exist."""


class CheckpointError(MoeCacheError):
    """Checkpoint files are missing, truncated, or contradict their own headers."""


class UnsupportedModelError(MoeCacheError):
    """The model is dense, or its experts or router cannot be handled."""


class BudgetError(MoeCacheError):
    """The memory budget cannot work; the message names the smallest that would."""


class ReadError(MoeCacheError):
    """Weights could not be read; of experts, the cache is unchanged and the call may be repeated."""
