"""Random numbers.

torch_npu hands the kernel the state of its Philox generator, ``(seed, offset)``. The numbers here
come from torch's CPU generator, seeded by that pair: repeatable and independent of each other, but
not the hardware's numbers. Operators named ``…Tensor`` serve captured graphs; they read seed and
offset from device memory, so that every replay draws other numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..table import operator, write

#: Odd multipliers of splitmix64: neighbouring offsets give unrelated generator states.
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK64 = (1 << 64) - 1
_MAX_INT64 = (1 << 63) - 1

Draw = Callable[..., torch.Tensor]


def _generator(seed: int, offset: int) -> torch.Generator:
    """Return a generator for one launch."""
    state = (seed + (offset + 1) * _MIX[0]) & _MASK64
    state = ((state ^ state >> 30) * _MIX[1]) & _MASK64
    state = ((state ^ state >> 27) * _MIX[2]) & _MASK64
    return torch.Generator().manual_seed((state ^ state >> 31) & _MAX_INT64)


def _uniform(shape: torch.Size, low: float, high: float, generator: torch.Generator) -> Any:
    return torch.rand(shape, dtype=torch.float64, generator=generator) * (high - low) + low


def _normal(shape: torch.Size, mean: float, std: float, generator: torch.Generator) -> Any:
    return torch.randn(shape, dtype=torch.float32, generator=generator) * std + mean


def _integers(shape: torch.Size, low: int, high: int, generator: torch.Generator) -> Any:
    return torch.randint(low, min(high, _MAX_INT64), shape, generator=generator)


def _below(target: torch.Tensor, drawn: torch.Tensor, high: float) -> torch.Tensor:
    """Round to the target's type without reaching ``high``, which uniform_ excludes."""
    rounded = drawn.to(target.dtype)
    limit = torch.tensor(high, dtype=target.dtype)
    largest = torch.nextafter(limit, torch.tensor(-torch.inf, dtype=target.dtype))
    return torch.where(rounded >= limit, largest, rounded)


def _register() -> None:
    def uniform(target: torch.Tensor, low: float, high: float, generator: torch.Generator) -> None:
        drawn = _uniform(target.shape, low, high, generator)
        write(target, _below(target, drawn, high) if high > low else drawn)

    def normal(target: torch.Tensor, mean: float, std: float, generator: torch.Generator) -> None:
        write(target, _normal(target.shape, mean, std, generator))

    def integers(target: torch.Tensor, low: int, high: int, generator: torch.Generator) -> None:
        write(target, _integers(target.shape, low, high, generator))

    def bernoulli(target: torch.Tensor, probability: Any, generator: torch.Generator) -> None:
        write(target, _uniform(target.shape, 0.0, 1.0, generator) < probability)

    _family("InplaceUniform", "Tdd", uniform)
    _family("InplaceNormal", "Tff", normal)
    _family("InplaceRandom", "Tii", integers)
    operator("aclnnInplaceBernoulli", "TSii")(_seeded(bernoulli))
    operator("aclnnInplaceBernoulliTensor", "TTii")(_seeded(bernoulli))


def _family(name: str, signature: str, draw: Callable[..., None]) -> None:
    operator(f"aclnn{name}", signature + "ii")(_seeded(draw))
    operator(f"aclnn{name}Tensor", signature + "TTi")(_seeded_by_tensor(draw))


def _seeded(draw: Callable[..., None]) -> Callable[..., None]:
    def compute(*args: Any) -> None:
        *rest, seed, offset = args
        draw(*rest, _generator(seed, offset))

    return compute


def _seeded_by_tensor(draw: Callable[..., None]) -> Callable[..., None]:
    def compute(*args: Any) -> None:
        *rest, seed, offset, within_graph = args
        draw(*rest, _generator(int(seed.item()), int(offset.item()) + within_graph))

    return compute


_register()


@operator("aclnnMultinomial", "TibiiT")
def _multinomial(
    weights: torch.Tensor, count: int, replacement: bool, seed: int, offset: int, out: torch.Tensor
) -> None:
    generator = _generator(seed, offset)
    write(out, torch.multinomial(weights.float(), count, replacement, generator=generator))


@operator("aclnnMultinomialTensor", "TibTTiT")
def _multinomial_tensor(
    weights: torch.Tensor,
    count: int,
    replacement: bool,
    seed: torch.Tensor,
    offset: torch.Tensor,
    within_graph: int,
    out: torch.Tensor,
) -> None:
    at = int(offset.item()) + within_graph
    _multinomial(weights, count, replacement, int(seed.item()), at, out)


@operator("aclnnRandperm", "iiiT")
def _randperm(count: int, seed: int, offset: int, out: torch.Tensor) -> None:
    write(out, torch.randperm(count, generator=_generator(seed, offset)))
