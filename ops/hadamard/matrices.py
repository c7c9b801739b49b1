"""Hadamard matrices whose order is no power of two, by Paley's constructions."""

from __future__ import annotations

from functools import cache

import torch

#: Largest order that is built; larger sizes take one of these and a power of two.
_MAX_ORDER = 256


@cache
def known_orders() -> tuple[int, ...]:
    """Return the orders, not powers of two, of which a matrix can be made."""
    return tuple(order for order in range(12, _MAX_ORDER + 1, 4) if _field_of(order) is not None)


def base_for(size: int) -> torch.Tensor | None:
    """Return the matrix that, with Sylvester's of a power of two, makes one of ``size``.

    None: size is a power of two, and needs no other.

    Raises:
        ValueError: no matrix of the size is known.
    """
    if size < 1:
        raise ValueError(f"block={size} must be at least 1; give a divisor of the columns of x.")
    odd = size // (size & -size)
    if odd == 1:
        return None
    order = 4 * odd
    while size % order == 0:
        if order in known_orders():
            return _paley(order)
        order *= 2
    raise ValueError(
        f"no Hadamard matrix of size {size} is known here; allowed are a power of two times 1 or "
        f"one of {', '.join(map(str, known_orders()))}. Give base, or a smaller block."
    )


def _field_of(order: int) -> tuple[int, bool] | None:
    """Return the prime q and whether it is Paley's second construction; None: there is none."""
    if order & (order - 1) == 0:
        return None
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return order - 1, False
    half = order // 2 - 1
    return (half, True) if _is_prime(half) and half % 4 == 1 else None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % divisor for divisor in range(2, int(q**0.5) + 1))


@cache
def _paley(order: int) -> torch.Tensor:
    """Return the float32 ``[order, order]`` matrix of 1 and -1."""
    found = _field_of(order)
    assert found is not None
    q, second = found
    squares = {i * i % q for i in range(1, q)}
    residue = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    index = torch.arange(q)
    jacobsthal = residue[(index[:, None] - index[None, :]) % q]  # [q, q]
    core = torch.zeros(q + 1, q + 1)
    core[0, 1:] = 1.0
    core[1:, 0] = 1.0 if second else -1.0
    core[1:, 1:] = jacobsthal
    if not second:
        return core + torch.eye(q + 1)
    diagonal = torch.eye(q + 1)
    plus, minus = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
    return torch.kron(core, plus) + torch.kron(diagonal, minus)
