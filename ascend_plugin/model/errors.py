"""Errors of the model conversion. Every message is one sentence to show to the user."""

from __future__ import annotations


class ModelError(RuntimeError):
    """A checkpoint could not be made."""


class ModelSourceError(ModelError):
    """What the checkpoint is made from is missing, damaged or of the wrong kind."""


class ModelDestinationError(ModelError):
    """The directory for the checkpoint cannot be written or holds something else."""
