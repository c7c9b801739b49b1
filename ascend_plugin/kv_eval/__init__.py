"""What an int8 KV cache does to a model: calibration of static scales, and their evaluation.

Models run in transformers, but their attention runs on the plugin's operators over the plugin's
pages, so that what is measured is what is served. Importing this package is cheap; torch and
transformers are loaded by the modules that need them.
"""

from __future__ import annotations

from ascend_plugin.kv_eval.errors import KVEvalError

__all__ = ["KVEvalError"]
