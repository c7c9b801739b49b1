"""Errors of calibration and evaluation. Every message is for the user."""

from __future__ import annotations


class KVEvalError(RuntimeError):
    """It cannot run as asked; the message names the value, what is allowed and the remedy."""
