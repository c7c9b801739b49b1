"""Which implementation of an operator runs, and why.

Each operator owns an :class:`Operator` with its implementations in order of preference. An
implementation answers for a request (a hashable description of one call's types and shapes)
whether it can serve it and, if not, why. The first that can is chosen; the choice is remembered
and logged once per request.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar, get_args

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: ``auto`` takes the first implementation that supports a request; the other names force one.
Policy = Literal["auto", "native", "reference"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

#: Debug switch, read once: wins over what the configuration says.
POLICY_VARIABLE = "ASCEND_PLUGIN_OPS"

#: A served model has a handful of signatures; this bounds what tests and sweeps leave behind.
_MAX_BOUND = 1024

RequestT = TypeVar("RequestT", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Support:
    """Answer of an implementation: can it serve a request, and why (or why not)."""

    ok: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Implementation(Generic[RequestT]):
    """One way to compute an operator.

    Attributes:
        name: ``reference``, ``native`` or ``npu``.
        supports: says whether a request can be served, and why.
        bind: takes pages and their layout, whose types and shapes will not change, and returns the
            kernel, with the operator's own arguments except ``layout``. What depends on these
            alone is computed here, once. None: the caller of ``Operator.choose`` runs it itself.
        load: of operators without pages: returns the kernel that serves all calls of a request.
    """

    name: str
    supports: Callable[[RequestT], Support]
    bind: Callable[[torch.Tensor, Any], Callable[..., Any]] | None = None
    load: Callable[[], Callable[..., Any]] | None = None


@dataclass(frozen=True, slots=True)
class Choice(Generic[RequestT]):
    """The chosen implementation and every reason that led to it."""

    implementation: Implementation[RequestT]
    reason: str
    rejected: tuple[tuple[str, str], ...]


class Bound(NamedTuple):
    """What is left to do for calls of one signature: their checks have passed.

    Attributes:
        run: the kernel; any pages of the signature's shape and strides will do.
        layout: byte map of the pages, of the type that the operator takes.
    """

    run: Callable[..., Any]
    layout: Any


class UnsupportedRequestError(ValueError):
    """No implementation can serve a request; the message lists each one's reason."""


@dataclass
class Operator(Generic[RequestT]):
    """An operator's implementations, best first.

    Attributes:
        name: the operator's name in ``torch.ops.ascend_plugin``.
        implementations: in order of preference.
    """

    name: str
    implementations: tuple[Implementation[RequestT], ...]
    _choices: dict[RequestT, Choice[RequestT]] = field(default_factory=dict, repr=False)
    _bound: dict[Hashable, Bound] = field(default_factory=dict, repr=False)
    _kernels: dict[Hashable, Callable[..., Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Make the operator known to :func:`operators`."""
        _operators[self.name] = self

    def bound(self, signature: Hashable) -> Bound | None:
        """Return what :meth:`bind` kept for a signature, or None at its first call."""
        return self._bound.get(signature)

    def bind(
        self, signature: Hashable, request: RequestT, pages: torch.Tensor, layout: Any
    ) -> Bound:
        """Choose an implementation for a signature whose checks have passed, and keep it.

        Checking and choosing anew would cost more than the kernel in a small decode step.

        Args:
            signature: everything of a call that its checks and the choice depend on.
            request: the same, for the choice.
            pages: pages of this signature.
            layout: byte map of the pages.
        """
        if len(self._bound) >= _MAX_BOUND:
            self._bound.clear()
        chosen = self.choose(request).implementation
        assert chosen.bind is not None, f"{chosen.name} of {self.name} is run by its caller"
        kept = Bound(chosen.bind(pages, layout), layout)
        self._bound[signature] = kept
        return kept

    def kernel(self, signature: Hashable) -> Callable[..., Any] | None:
        """Return what :meth:`load` kept for a signature, or None at its first call."""
        return self._kernels.get(signature)

    def load(self, signature: Hashable, request: RequestT) -> Callable[..., Any]:
        """Choose the kernel of a signature whose checks have passed, and keep it.

        :meth:`bind` for operators without pages.

        Args:
            signature: everything of a call that its checks and the choice depend on.
            request: the same, for the choice.
        """
        if len(self._kernels) >= _MAX_BOUND:
            self._kernels.clear()
        chosen = self.choose(request).implementation
        assert chosen.load is not None, f"{chosen.name} of {self.name} is run by its caller"
        kernel = chosen.load()
        self._kernels[signature] = kernel
        return kernel

    def forget(self) -> None:
        """Forget choices, because what they depend on has changed."""
        self._choices.clear()
        self._bound.clear()
        self._kernels.clear()

    def choose(self, request: RequestT) -> Choice[RequestT]:
        """Return the implementation that serves ``request`` under the current policy.

        Raises:
            UnsupportedRequestError: none can.
        """
        choice = self._choices.get(request)
        if choice is None:
            choice = self._decide(request)
            self._choices[request] = choice
            logger.info(
                "%s runs on '%s' for %s: %s",
                self.name,
                choice.implementation.name,
                request,
                choice.reason,
            )
        return choice

    def _decide(self, request: RequestT) -> Choice[RequestT]:
        wanted = policy()
        rejected: list[tuple[str, str]] = []
        for implementation in self.implementations:
            if wanted != "auto" and implementation.name != wanted:
                rejected.append((implementation.name, f"the policy asks for '{wanted}'"))
                continue
            support = implementation.supports(request)
            if support.ok:
                return Choice(implementation, support.reason, tuple(rejected))
            rejected.append((implementation.name, support.reason))
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
        raise UnsupportedRequestError(
            f"no implementation of {self.name} serves {request} ({reasons}). "
            f"Set ops.implementation to one of {', '.join(POLICIES)} in --additional-config."
        )


_operators: dict[str, Operator[Any]] = {}
_policy: Policy = "auto"


def operators() -> dict[str, Operator[Any]]:
    """Return every operator by name."""
    return dict(_operators)


def policy() -> Policy:
    """Return the policy in force: the environment's, else the configured one."""
    forced = os.environ.get(POLICY_VARIABLE)
    return _policy if forced is None else _checked_policy(forced, POLICY_VARIABLE)


def set_policy(value: Policy) -> None:
    """Set the policy for this process and forget earlier choices."""
    global _policy
    _policy = _checked_policy(value, "policy")
    for operator in _operators.values():
        operator.forget()


def _checked_policy(value: str, source: str) -> Policy:
    for allowed in POLICIES:
        if value == allowed:
            return allowed
    raise ValueError(f"{source}={value!r} is unknown; use one of {', '.join(POLICIES)}.")
