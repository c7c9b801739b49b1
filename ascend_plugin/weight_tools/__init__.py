"""Quantised checkpoints: made with the tools that users know, converted, and judged.

Each tool runs in an environment of its own, because its pins conflict with vLLM's; the scripts in
``workers`` run there and import nothing of this project. Importing this package is cheap.
"""

from __future__ import annotations

from ascend_plugin.weight_tools.errors import WeightToolError

__all__ = ["WeightToolError"]
