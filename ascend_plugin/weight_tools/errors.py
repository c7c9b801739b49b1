"""Errors of making, converting and judging checkpoints. Every message is for the user."""

from __future__ import annotations


class WeightToolError(RuntimeError):
    """It cannot run as asked; the message names the value, what is allowed and the remedy."""
