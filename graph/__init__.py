"""Decode steps that are captured once and repeated: graphs of NPUs, native calls of CPUs."""

if __name__ != "ascend_plugin.graph":
    raise ImportError(
        f"import this package as 'ascend_plugin.graph', not as {__name__!r}: a second copy would "
        "hold its own captured graphs."
    )
