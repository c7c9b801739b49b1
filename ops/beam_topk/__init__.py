"""The k best tokens of each beam, from quantised logits."""

from __future__ import annotations

import torch

from .. import checks
from ..library import needs_dispatcher, register
from . import reference
from .reference import QuantisedLogits, TopK, quantise_logits

__all__ = [
    "MAX_K",
    "MAX_VOCAB",
    "SCHEMA",
    "QuantisedLogits",
    "TopK",
    "beam_topk",
    "quantise_logits",
]

SCHEMA = (
    "beam_topk(Tensor codes, Tensor scales, int k, Tensor? logits=None) "
    "-> (Tensor indices, Tensor scores, Tensor log_probs)"
)

#: Beam search of width 8 looks at twice as many tokens, because some of them end a beam.
MAX_K = 16

#: The kernel of the NPU keeps the greatest code of every 128 in 4 KiB.
MAX_VOCAB = 262144


def beam_topk(
    codes: torch.Tensor, scales: torch.Tensor, k: int, logits: torch.Tensor | None = None
) -> TopK:
    """Return the k greatest logits of each row and the log-softmax over them.

    Rows are beams. Without ``logits`` the order is that of the codes, so it is exact integer
    arithmetic; among equals the lower index comes first. Let ``step = scales[row]``, and let the
    codes be those of :func:`quantise_logits`. Then the i-th score differs from the i-th greatest
    logit by at most ``(1/2 + 2**-14) * step``, each kept token's own logit lies at most
    ``(1 + 2**-13) * step`` below the k-th greatest, and the log-softmax differs from that of the
    k greatest logits by at most ``(1 + 2**-13) * step`` and float32's rounding of it (2**-20 of
    the larger of 1 and its magnitude).

    With ``logits`` the result is exact: every token whose code is at most one step below the k-th
    best code is scored again by its logit. The k best are among these whenever a logit differs from
    ``codes * scales`` by less than one step, which :func:`quantise_logits` guarantees, -infinity
    included. However many these are, all of them are scored: flat logits cost time, not accuracy.

    The softmax is taken over the k kept scores, not over the vocabulary: a beam search that wants
    probabilities of the whole vocabulary subtracts ``logsumexp`` from ``scores`` instead.

    Example:
        >>> logits = torch.tensor([[0.5, 2.0, 2.0, -1.0]])
        >>> codes, scales = quantise_logits(logits)
        >>> beam_topk(codes, scales, 2, logits).indices
        tensor([[1, 2]], dtype=torch.int32)

    Args:
        codes: int8 ``[rows, vocab]``, -127 to 127, last dimension contiguous.
        scales: float32 ``[rows]``, contiguous, not negative and finite.
        k: 1 to 16 and at most ``vocab``.
        logits: float32, float16 or bfloat16 ``[rows, vocab]``, last dimension contiguous, finite
            or -infinity; what the codes were made of. None: the scores are ``codes * scales``.

    Returns:
        ``indices``, int32 ``[rows, k]``, greatest score first; ``scores``, float32 ``[rows, k]``:
        ``codes * scales``, or the logits, of which those below the lowest finite float32 count as
        that; ``log_probs``, float32 ``[rows, k]``.

    Raises:
        ValueError: a shape, dtype, stride or ``k`` is not as above.
    """
    call = torch.ops.ascend_plugin.beam_topk if needs_dispatcher(codes) else _cpu
    return TopK(*call(codes, scales, k, logits))


def check(codes: torch.Tensor, scales: torch.Tensor, k: int, logits: torch.Tensor | None) -> None:
    """Refuse arguments that no implementation takes; see :func:`beam_topk`.

    Raises:
        ValueError: a shape, dtype, stride or ``k``.
    """
    checks.check_integer("codes", codes, torch.int8, 2)
    rows, vocab = codes.shape
    if vocab > MAX_VOCAB:
        raise ValueError(
            f"codes have {vocab} columns; at most {MAX_VOCAB} are supported. Split the vocabulary "
            "and merge the results."
        )
    if not 1 <= k <= min(MAX_K, vocab):
        raise ValueError(
            f"k={k} is not supported for a vocabulary of {vocab}; allowed are 1 to "
            f"{min(MAX_K, vocab)}. Beam search of width w needs 2 * w, so lower the beam width."
        )
    if scales.dtype != torch.float32 or list(scales.shape) != [rows]:
        raise ValueError(
            f"scales must be float32 [{rows}], one for each row of codes, got {scales.dtype} "
            f"{list(scales.shape)}; make both with quantise_logits."
        )
    if not scales.is_contiguous():
        raise ValueError("scales must be contiguous; call .contiguous().")
    if logits is not None:
        _check_logits(logits, codes)


def _check_logits(logits: torch.Tensor, codes: torch.Tensor) -> None:
    checks.check_float("logits", logits.dtype)
    if logits.shape != codes.shape:
        raise ValueError(
            f"logits {list(logits.shape)} must have the shape of codes {list(codes.shape)}: they "
            "are what the codes were made of."
        )
    if not checks.rows_contiguous(logits):
        raise ValueError("logits must be contiguous in their last dimension; call .contiguous().")


# One implementation, so there is no Operator that would choose: on a CPU nothing is gained over
# torch's own sort, which is exact.
def _cpu(
    codes: torch.Tensor, scales: torch.Tensor, k: int, logits: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check(codes, scales, k, logits)
    return reference.beam_topk(codes, scales, k, logits)


def _fake(
    codes: torch.Tensor, scales: torch.Tensor, k: int, logits: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (codes.shape[0], k)
    return (
        codes.new_empty(shape, dtype=torch.int32),
        codes.new_empty(shape, dtype=torch.float32),
        codes.new_empty(shape, dtype=torch.float32),
    )


register(SCHEMA, cpu=_cpu, fake=_fake)
