"""Operators of the plugin: schema, reference, fake and implementations.

This package imports torch and never vLLM; only ``ops.npu`` imports torch_npu, lazily.
"""

if __name__ != "ascend_plugin.ops":
    raise ImportError(
        f"import this package as 'ascend_plugin.ops', not as {__name__!r}: a second copy would "
        "register every operator twice. Run from a directory where 'ops' is not importable, or "
        "change the import."
    )
