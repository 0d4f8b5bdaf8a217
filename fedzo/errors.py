"""Errors that a user can act on. The command line prints their message and nothing else.

A message names the thing, the value found, the value wanted and what to do; it never contains training data.
"""


def shown(value: object, length: int = 80) -> str:
    """A value that another party chose, as messages and logs may show it: ASCII on one line, escaped, cut."""
    text = ascii(value[:length] if isinstance(value, str | bytes) else value)
    return text if len(text) <= length else f"{text[:length]}..."


class FedzoError(Exception):
    """Base of all errors that fedzo raises on purpose."""


class ConfigError(FedzoError):
    """A configuration key or value cannot be used."""


class DataError(FedzoError):
    """A data file or data set cannot be used."""


class ModelError(FedzoError):
    """A base model cannot be loaded or is not what the run expects."""


class SpaceError(FedzoError):
    """A trainable space cannot be built on this model."""


class LedgerError(FedzoError):
    """A ledger is damaged, truncated or belongs to another run."""


class ProtocolError(FedzoError):
    """A message does not follow the protocol."""


class RunError(FedzoError):
    """A run cannot start or go on."""


class DivergedError(RunError):
    """A run's loss is far above its start, or not finite."""
