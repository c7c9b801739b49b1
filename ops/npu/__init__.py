"""Operators on an Ascend NPU, through torch_npu.

Only this package imports torch_npu, and the package is imported only where an NPU is served: what
imports it pays for the driver. Importing :mod:`ops.npu.library` registers the plugin's operators
for the dispatch key ``PrivateUse1``.
"""
