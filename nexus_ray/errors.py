"""Errors that a user can act on: each message names the field, the value, the rule and the way out.

Every class takes a single message, so that instances stay picklable: they cross Ray process borders.
"""

from __future__ import annotations


class NexusError(Exception):
    """Base of all errors raised on purpose; the command line prints the message without a traceback."""

    exit_code = 1


class ConfigError(NexusError, ValueError):
    """The configuration, or the machine it is meant for, does not fit. Nothing has been started."""

    exit_code = 2


class DataError(NexusError, ValueError):
    """A corpus, shard or manifest is missing, empty, corrupt or does not belong to this run."""


class CheckpointError(NexusError, RuntimeError):
    """A checkpoint is torn, belongs to another run, or does not reproduce what was saved."""


class TrainingError(NexusError, RuntimeError):
    """Training cannot go on (a non-finite loss, say); the message names the last good checkpoint."""


class WorkersLost(NexusError, RuntimeError):
    """Processes of training workers died more often than `training.max_restarts` has them started again."""


class ForgettingError(NexusError, RuntimeError):
    """The forgetting gate closed: `continual.max_forgetting` was exceeded."""


class SynthesisError(NexusError, RuntimeError):
    """Generation failed beyond its error budget."""


class Interrupted(NexusError):
    """The user or the scheduler asked the run to stop; a checkpoint was written."""

    exit_code = 130


class Paused(NexusError):
    """A study paused the run at an evaluation; a checkpoint was written, and the same config goes on from it."""


class Stopped(NexusError):
    """A study ended the run at an evaluation; a checkpoint was written."""
