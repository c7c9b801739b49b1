"""Errors of the simulator; every message names the value, what is allowed and the remedy."""

from __future__ import annotations


class SimulatorError(RuntimeError):
    """The simulated NPU cannot do what was asked."""


class SimulatorBuildError(SimulatorError):
    """The stand-in libraries could not be built; the message says what to do."""
