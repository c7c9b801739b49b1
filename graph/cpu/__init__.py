"""Decode steps on the CPU as lists of native calls.

A decode step of a small model spends more time between its kernels than in them: some hundred
operators, 20 to 80 us of Python and dispatch each. So a step is recorded once, as the calls of
native kernels that it makes, and repeated from C (``ops/native/steps.py``).

While a step is recorded, a dispatch mode sees every operator of torch, vLLM and the plugin:

- views do nothing at run time, and pass;
- memory comes from a pool that all recorded steps share, because one runs at a time;
- the plugin's operators run as always, and the library notes which kernels they call;
- operators of torch and vLLM for which there is a native kernel are computed by that;
- anything else ends the recording (:class:`NotRecordable`): a step is repeated whole or not at all.

As with graphs of an accelerator, a repeated step reads and writes the addresses that it was
recorded with; who repeats it makes sure that they still hold the step's inputs.
"""

from .lowering import NotRecordable
from .pool import Pool
from .recorder import RecordedStep, record_step

__all__ = ["NotRecordable", "Pool", "RecordedStep", "record_step"]
