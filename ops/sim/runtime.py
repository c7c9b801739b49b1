"""The C++ runtime of this process, through ctypes: what the Python operators need of it."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from .errors import SimulatorError
from .standins import CORE_LIBRARY

#: Operators enqueued or captured, captures begun, replays run, task groups captured, updates of
#: task groups run, collectives enqueued or captured.
COUNTERS = ("launches", "captures", "replays", "task_groups", "updates", "collectives")

_POINTER_ARGUMENT = [ctypes.c_void_p]


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one simulated device in this process, in bytes."""

    allocated: int
    peak: int
    limit: int


@functools.cache
def library() -> ctypes.CDLL:
    """Return the stand-in library that this process runs on, its functions typed.

    Raises:
        SimulatorError: this process does not run under ``ascend-plugin sim run``.
    """
    try:
        loaded = ctypes.CDLL(CORE_LIBRARY)
        count = loaded.sim_operator_count
    except (OSError, AttributeError):
        raise SimulatorError(
            "this process has no simulated NPU; start it with: ascend-plugin sim run -- COMMAND."
        ) from None
    count.restype = ctypes.c_int64
    loaded.sim_operator_name.argtypes = [ctypes.c_int64]
    loaded.sim_operator_name.restype = ctypes.c_char_p
    loaded.sim_set_operator.argtypes = [ctypes.c_int64, ctypes.c_void_p]
    loaded.sim_set_operator.restype = None
    for name in ("sim_set_launcher", "sim_set_release"):
        function = getattr(loaded, name)
        function.argtypes, function.restype = _POINTER_ARGUMENT, None
    for name in (
        "sim_object_kind",
        "sim_device_of",
        "sim_bytes_left",
        "sim_graph_nodes",
        "sim_graph_groups",
        "sim_graph_replays",
    ):
        function = getattr(loaded, name)
        function.argtypes, function.restype = _POINTER_ARGUMENT, ctypes.c_int64
    for name in ("sim_allocated", "sim_peak", "sim_limit"):
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
    loaded.sim_object_count.argtypes = []
    loaded.sim_object_count.restype = ctypes.c_int64
    loaded.sim_counter.argtypes = [ctypes.c_char_p]
    loaded.sim_counter.restype = ctypes.c_int64
    loaded.sim_set_error.argtypes = [ctypes.c_char_p]
    loaded.sim_set_error.restype = None
    loaded.sim_option.argtypes = [ctypes.c_char_p]
    loaded.sim_option.restype = ctypes.c_char_p
    return loaded


class Runtime:
    """Typed calls into the stand-in library.

    Raises:
        SimulatorError: this process does not run under ``ascend-plugin sim run``.
    """

    def __init__(self) -> None:
        self._library = library()
        # Called for every argument of every operator.
        self._object_kind = self._library.sim_object_kind
        self._device_of = self._library.sim_device_of

    def operator_names(self) -> list[str]:
        """Return the wheel's aclnn operators, in the order of their slots."""
        count = int(self._library.sim_operator_count())
        return [self._library.sim_operator_name(index).decode() for index in range(count)]

    def set_operator(self, index: int, phase1: int) -> None:
        """Put the address of a C callback into a slot."""
        self._library.sim_set_operator(index, phase1)

    def set_launcher(self, launcher: int) -> None:
        """Set the C callback ``int (executor, stream id, number of the replay or 0)``."""
        self._library.sim_set_launcher(launcher)

    def set_release(self, release: int) -> None:
        """Set the C callback ``void (executor)``, called when nothing holds an executor."""
        self._library.sim_set_release(release)

    def object_kind(self, pointer: int) -> int:
        """Return the kind of a live op-api object (1 tensor, 2 scalar, …); 0 if it is none."""
        return int(self._object_kind(pointer))

    def object_count(self) -> int:
        """Return the number of live op-api objects."""
        return int(self._library.sim_object_count())

    def device_of(self, pointer: int) -> int:
        """Return the device whose memory holds an address, or -1."""
        return int(self._device_of(pointer))

    def bytes_left(self, pointer: int) -> int:
        """Return the bytes from an address to the end of its allocation; 0 if it has none."""
        return int(self._library.sim_bytes_left(pointer))

    def memory(self, device: int) -> Memory:
        """Return what a device has and holds."""
        return Memory(
            allocated=int(self._library.sim_allocated(device)),
            peak=int(self._library.sim_peak(device)),
            limit=int(self._library.sim_limit(device)),
        )

    def counters(self) -> dict[str, int]:
        """Return what this process has done: see ``COUNTERS``."""
        return {name: int(self._library.sim_counter(name.encode())) for name in COUNTERS}

    def set_error(self, text: str) -> None:
        """Set the text that this thread's next error shows."""
        self._library.sim_set_error(text.encode(errors="replace"))

    def option(self, name: str) -> str | None:
        """Return an option of ``ascend-plugin sim run``; None if it was not given."""
        value: bytes = self._library.sim_option(name.encode())
        return value.decode() or None
