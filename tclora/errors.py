"""The domain errors of tclora: what a user can fix, and how.

Arguments of library functions raise ``ValueError``/``TypeError``; what comes from outside (data
files, configurations, models, adapters, training jobs) raises one of these. Every message names the
field, file or row, the value found and the remedy.
"""


class TcloraError(Exception):
    """Base of every error a user of tclora can cause or repair."""


class ConfigError(TcloraError):
    """A configuration is not valid; lists every problem found."""


class DataError(TcloraError):
    """Input data is missing, malformed or too small."""


class ModelError(TcloraError):
    """A base or embedding model cannot be found or does not fit the request."""


class AdapterError(TcloraError):
    """An adapter cannot be read, or adapters do not belong together."""


class LibraryError(TcloraError):
    """A library directory is incomplete, corrupt or of another version."""


class JobError(TcloraError):
    """A training or evaluation job failed in its subprocess."""


class StoreError(TcloraError):
    """A store of files cannot be used, or does not hold what it must."""


class NonFiniteLossError(TcloraError):
    """The training loss became NaN or infinite."""
