"""AscendC kernels of this package, and the host model that runs them without an NPU.

``kernels/`` holds the kernels (one C++ file per operator), ``host/`` the model. ``build`` compiles
a kernel against the model, ``host`` launches it under schedules.
"""
