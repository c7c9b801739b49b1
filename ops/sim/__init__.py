"""A simulated CANN: the real torch_npu wheel on a machine that has neither an NPU nor CANN.

torch_npu is a C++ library over some two hundred functions of CANN. This package builds stand-ins
for CANN's libraries from the wheel's own symbol tables and a small C++ runtime (``csrc``): device
memory, streams, events, captured graphs, collectives. The operators are computed by the Python
functions of ``operators``. torch_npu itself runs unchanged, so its dispatch, allocator, task queue
and graphs are the ones that run on hardware.

What is not simulated fails with its name; nothing answers success in silence. Numbers come from
the CPU and times mean nothing.

Importing this package imports neither torch nor torch_npu: ``ascend-plugin sim run`` must work
where ``import torch`` fails, because torch_npu is installed and CANN is not.
"""

from __future__ import annotations

from .errors import SimulatorBuildError, SimulatorError
from .home import Simulator, build, status
from .options import SCHEDULES, SimulatorOptions

__all__ = [
    "SCHEDULES",
    "Simulator",
    "SimulatorBuildError",
    "SimulatorError",
    "SimulatorOptions",
    "build",
    "status",
]
