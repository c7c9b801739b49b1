"""Benchmarks: the plugin against vLLM's own CPU code, both in the same run.

Importing this package is cheap; torch and vLLM are loaded by the modules that need them.
"""

from __future__ import annotations

from ascend_plugin.bench.errors import BenchError

__all__ = ["BenchError"]
