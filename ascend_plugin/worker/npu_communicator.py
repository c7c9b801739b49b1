"""Collectives between the NPUs of a tensor parallel group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase


class AscendCommunicator(DeviceCommunicatorBase):
    """Collectives over hccl; captured graphs contain them like any kernel."""

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """Return the sum over the group, as a new tensor: opaque operators must not alias."""
        out = input_.clone()
        dist.all_reduce(out, group=self.device_group)
        return out
