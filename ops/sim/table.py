"""The table of simulated aclnn operators, and their two phases.

An operator registers itself by name and signature with :func:`operator`. :func:`install` hands the
runtime one C callback per operator: phase 1 decodes the arguments, checks the hardware's
constraints and keeps the call under an executor id; the launch computes. Shapes and addresses are
fixed in phase 1, contents are read at the launch, which a graph may repeat.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .arguments import ArgumentError, Decoder, FractalTensor, c_types
from .constraints import ConstraintError
from .runtime import Runtime
from .trace import Trace

logger = logging.getLogger(__name__)

#: Codes of aclnn (``aclnn/aclnn_base.h``): wrong parameter, and error inside the operator.
PARAM_INVALID = 161002
INNER_ERROR = 561000

#: What an operator with ``...GetMaxWorkspaceSize`` answers; kernels here need no workspace.
MAX_WORKSPACE = 4096

Compute = Callable[..., None]
ComputeT = TypeVar("ComputeT", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Operator:
    """One simulated operator.

    Attributes:
        name: with ``aclnn``.
        signature: letters of :mod:`.arguments`.
        compute: takes the decoded arguments and writes the outputs.
        check: takes the same; raises :class:`ConstraintError`.
        traffic: takes the same; bytes that the kernel reads and writes. Default: every tensor once.
        uncomputed: takes the same, with NZ tensors as they are; runs instead of ``compute`` on a
            simulator without matrix products (``SimulatorOptions.products``).
    """

    name: str
    signature: str
    compute: Compute
    check: Callable[..., None] | None
    traffic: Callable[..., int] | None
    uncomputed: Compute | None = None


OPERATORS: dict[str, Operator] = {}


def operator(
    name: str,
    signature: str,
    *,
    check: Callable[..., None] | None = None,
    traffic: Callable[..., int] | None = None,
    uncomputed: Compute | None = None,
) -> Callable[[ComputeT], ComputeT]:
    """Register an operator; arguments as in :class:`Operator`."""

    def register(compute: ComputeT) -> ComputeT:
        if name in OPERATORS:
            raise ValueError(f"{name} is registered twice")
        OPERATORS[name] = Operator(name, signature, compute, check, traffic, uncomputed)
        return compute

    return register


def write(out: torch.Tensor, value: torch.Tensor) -> None:
    """Write a result; its shape must be the output's (``copy_`` alone would broadcast)."""
    if out.shape != value.shape:
        raise ValueError(f"result {tuple(value.shape)} for an output {tuple(out.shape)}")
    out.copy_(value)


class Call:
    """One call of an operator, which graphs may launch many times."""

    __slots__ = ("args", "fractal", "operator")

    def __init__(self, operator: Operator, args: list[Any]) -> None:
        self.operator = operator
        self.args = args
        self.fractal = any(
            isinstance(each, FractalTensor)
            or (isinstance(each, list) and any(isinstance(item, FractalTensor) for item in each))
            for each in args
        )

    def run(self) -> None:
        """Compute; NZ tensors are matrices meanwhile, and are written back if they changed."""
        if not self.fractal:
            self.operator.compute(*self.args)
            return
        loaded: list[tuple[FractalTensor, torch.Tensor, int]] = []

        def matrix(each: Any) -> Any:
            if isinstance(each, list):
                return [matrix(item) for item in each]
            if not isinstance(each, FractalTensor):
                return each
            value = each.load()
            loaded.append((each, value, value._version))
            return value

        self.operator.compute(*[matrix(each) for each in self.args])
        for tensor, value, version in loaded:
            if value._version != version:
                tensor.store(value)


class Table:
    """Operators bound to one runtime.

    Attributes:
        launches: how often each operator ran in this process.
        absent: registered operators that this torch_npu does not name.
    """

    def __init__(self, runtime: Runtime, trace: Trace | None = None, products: bool = True) -> None:
        self._runtime = runtime
        self._products = products
        self._trace = trace
        self._decoder = Decoder(runtime.object_kind, runtime.bytes_left)
        self._calls: dict[int, Call] = {}
        self._ids = itertools.count(1)
        self._callbacks: list[Any] = []  # C holds their addresses only
        self.launches: Counter[str] = Counter()
        names = runtime.operator_names()
        self.absent = sorted(OPERATORS.keys() - set(names))
        if self.absent:
            logger.debug("operators that this torch_npu does not know: %s", self.absent)
        for index, name in enumerate(names):
            if name in OPERATORS:
                phase1 = self._phase1(OPERATORS[name])
                runtime.set_operator(index, self._callback(phase1, *self._arguments(name)))
        runtime.set_launcher(self._callback(self._launch, *[ctypes.c_int64] * 3))
        release = ctypes.CFUNCTYPE(None, ctypes.c_int64)(self._release)
        self._callbacks.append(release)
        runtime.set_release(_address(release))

    def __len__(self) -> int:
        """Count the calls that queues and graphs hold."""
        return len(self._calls)

    def _arguments(self, name: str) -> list[Any]:
        pointers = [ctypes.c_void_p, ctypes.c_void_p]  # workspace size, executor
        return [*c_types(OPERATORS[name].signature), *pointers]

    def _callback(self, function: Callable[..., int], *arguments: Any) -> int:
        callback = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(function)
        self._callbacks.append(callback)
        return _address(callback)

    def _phase1(self, operator: Operator) -> Callable[..., int]:
        workspace = MAX_WORKSPACE if operator.name.endswith("MaxWorkspaceSize") else 0

        def phase1(*raw: Any) -> int:
            try:
                with _Isolated():
                    args = self._decoder.decode(operator.signature, raw[:-2])
                    if operator.check is not None:
                        operator.check(*args)
                ctypes.c_uint64.from_address(raw[-2]).value = workspace
                if not workspace:  # a query for a workspace is never launched
                    executor = next(self._ids)
                    self._calls[executor] = Call(operator, args)
                    ctypes.c_int64.from_address(raw[-1]).value = executor
            except (ConstraintError, ArgumentError) as error:
                self._runtime.set_error(f"{operator.name}: {error}")
                return PARAM_INVALID
            except BaseException as error:  # must not pass through C
                return self._failed(operator.name, error)
            return 0

        return phase1

    def _launch(self, executor: int, stream: int, replay: int) -> int:
        name = f"executor {executor}"
        try:
            call = self._calls[executor]
            name = call.operator.name
            with _Isolated():
                uncomputed = None if self._products else call.operator.uncomputed
                if uncomputed is None:
                    call.run()
                else:
                    uncomputed(*call.args)
                self.launches[name] += 1
                if self._trace is not None:
                    self._trace.launch(call.operator, call.args, stream, replay)
        except BaseException as error:  # must not pass through C
            return self._failed(name, error)
        return 0

    def _release(self, executor: int) -> None:
        self._calls.pop(executor, None)

    def _failed(self, name: str, error: BaseException) -> int:
        where = traceback.extract_tb(error.__traceback__)[-1]
        self._runtime.set_error(
            f"{name}: {type(error).__name__}: {error} ({where.name}, line {where.lineno})"
        )
        logger.debug("%s failed", name, exc_info=error)
        return INNER_ERROR


def install(runtime: Runtime) -> Table:
    """Bind every registered operator to this process's stand-ins."""
    path = runtime.option("trace")
    products = runtime.option("products") != str(False)
    return Table(runtime, Trace(path) if path else None, products)


def _address(callback: Any) -> int:
    return ctypes.cast(callback, ctypes.c_void_p).value or 0


class _Isolated:
    """Leaves the modes of the caller, on whose thread an operator may run.

    vLLM runs its model in inference mode and under torch-function modes (default device); tensors
    made here would be inference tensors, or NPU tensors that call the simulator again. A class of
    its own because contextlib and torch's Python guards cost more than a small operator.
    """

    __slots__ = ("_grad", "_guards")

    def __enter__(self) -> None:
        self._guards = (
            torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD),
            torch._C._InferenceMode(False),
            torch._C.DisableTorchFunction(),
        )
        for guard in self._guards:
            guard.__enter__()
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch._C._set_grad_enabled(self._grad)
        for guard in reversed(self._guards):
            guard.__exit__(None, None, None)


_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradPrivateUse1)
