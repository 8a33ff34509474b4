"""The errors that `compress` raises on purpose; each message says what happened, where, and what to do.

CompressError                 exit code 2
├── RecipeError               the recipe is at fault; carries every fault found
├── UsageError                a command or call that cannot be meant
├── DataError                 a calibration or evaluation file is at fault
├── CheckpointError           a model folder is at fault
├── VerificationError         exit code 1: an artifact does not do what the checkpoint it came from does
├── StoreError                exit code 3: the store or an output folder cannot be read or written
└── MissingError              exit code 3: something is not here (model, runtime, GPU)
    └── ServerError           a runtime was started and did not serve
"""

from __future__ import annotations

from collections.abc import Sequence

from compress.untrusted.redaction import redact


class CompressError(Exception):
    """What every error of this package is; `exit_code` is what the command line ends with. Its message holds no secret."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class RecipeError(CompressError):
    """A recipe that cannot be run; `faults` holds one line per fault, all that were found."""

    def __init__(self, faults: Sequence[str] | str) -> None:
        self.faults = tuple(redact(fault) for fault in ([faults] if isinstance(faults, str) else faults))
        super().__init__("\n".join(self.faults))


class UsageError(CompressError):
    """A command line or a call that cannot be meant."""


class DataError(CompressError):
    """A calibration or evaluation sample, or the file it comes from, cannot be used."""


class CheckpointError(CompressError):
    """A folder that is no usable checkpoint: a missing, damaged or unsupported part."""


class VerificationError(CompressError):
    """An exported artifact that gives other results than the checkpoint it came from; names the first part that differs."""

    exit_code = 1


class StoreError(CompressError):
    """The store, a run folder or an output folder cannot be read or written."""

    exit_code = 3


class MissingError(CompressError):
    """Something the recipe needs is not on this machine."""

    exit_code = 3


class ServerError(MissingError):
    """A runtime's server ended or did not answer; the message holds its last log lines."""
