"""Checkpoints made without a model hub: a converted SmolLM2 and tiny random ones.

Importing this package is cheap; torch, gguf and tokenizers are loaded by the functions that
need them, so the command line starts quickly.
"""

from __future__ import annotations

from ascend_plugin.model.errors import ModelDestinationError, ModelError, ModelSourceError
from ascend_plugin.model.smollm2 import ConversionResult, convert_smollm2

__all__ = [
    "ConversionResult",
    "ModelDestinationError",
    "ModelError",
    "ModelSourceError",
    "convert_smollm2",
]
