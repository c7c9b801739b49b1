"""The device module of torch_npu: streams, events, graphs and memory, as ``torch.npu`` has them."""

from __future__ import annotations

from typing import Any

import torch_npu

#: ``torch.npu``, which exists only after torch_npu was imported, and which type checkers ignore.
npu: Any = torch_npu.npu
