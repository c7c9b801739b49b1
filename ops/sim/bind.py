"""Imported by the C++ runtime when a process reaches its first operator: fills the slots."""

from __future__ import annotations

from . import operators
from .runtime import Runtime
from .table import install

__all__ = ["TABLE", "operators"]

#: Of this process; holds the callbacks that C++ calls.
TABLE = install(Runtime())
