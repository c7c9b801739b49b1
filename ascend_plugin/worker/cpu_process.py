"""In which process a model runs on a CPU, and on how many of its cores.

vLLM 0.32 gives every model on a CPU a process of its own and keeps one core free for the process
that schedules. On two cores that is half of the machine, and each step's messages wait for two
processes to wake. Where cores are few, the plugin runs the model in the scheduler's process, as
vLLM does on a GPU, on every core: the scheduler waits while the model computes.

What is said explicitly stays: ``--distributed-executor-backend``, ``VLLM_CPU_OMP_THREADS_BIND``,
``VLLM_CPU_NUM_OF_RESERVED_CPU`` and ``OMP_NUM_THREADS``.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch
from vllm import envs
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

#: From so many cores on, the one that vLLM keeps free costs less than threads that nobody binds.
MANY_CORES = 8

#: How a user asks vLLM to bind a model's threads to cores, for which it needs its own process.
_BINDING = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU")


def may_share(vllm_config: VllmConfig) -> bool:
    """Say whether a model may run in the scheduler's process; to be asked before vLLM decides.

    Args:
        vllm_config: of the engine, where ``distributed_executor_backend`` still is ``uni`` unless
            the user named another one, or several processes are needed.
    """
    parallel = vllm_config.parallel_config
    return (
        parallel.distributed_executor_backend == "uni"
        and parallel.data_parallel_size == 1
        and vllm_config.kv_transfer_config is None
        and not _binding_asked_for()
        and cores_are_few()
    )


def cores_are_few() -> bool:
    """Say whether the cores that this process may use are fewer than ``MANY_CORES``, on one node.

    Over several nodes vLLM's worker would bind its memory to one of them.
    """
    cores = _physical_cores()
    return len(cores) < MANY_CORES and len({node for node, _ in cores}) == 1


def is_shared(vllm_config: VllmConfig) -> bool:
    """Say whether a server's model runs in its scheduler's process.

    An engine in the user's own process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``) is none of that: its
    threads are the user's.
    """
    backend = vllm_config.parallel_config.distributed_executor_backend
    return backend == "uni" and bool(envs.VLLM_ENABLE_V1_MULTIPROCESSING)


def use_cores() -> None:
    """Compute on every core, unless ``OMP_NUM_THREADS`` says on how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(_physical_cores()))
    logger.info(
        "The model runs in the scheduler's process, on %d threads, because cores are few. "
        "--distributed-executor-backend mp gives it a process of its own.",
        torch.get_num_threads(),
    )


def _binding_asked_for() -> bool:
    values = [os.environ.get(name, "") for name in _BINDING]
    return any(value not in ("", "nobind") for value in values)


def _physical_cores() -> set[tuple[int, int]]:
    """Return the cores that this process may use, as nodes and numbers."""
    return {(cpu.numa_node, cpu.physical_core) for cpu in get_allowed_cpu_list()}
