"""Parts of a layer on this process, joined where they can be multiplied at once.

Linear layers are made of one or several modules of the checkpoint, experts of two products each;
both are runs of parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .check import CODES_ROLE
from .errors import CheckpointError, missing_tensor
from .execute import LinearKernel, Operand, make_float_kernel, make_kernel
from .plan import Plan, plan
from .rotate import Rotate
from .scheme import ModuleScheme, Rotation
from .shards import Shard, check_shard, shard_codes
from .target import Target
from .tensors import TensorIndex
from .unpack import Codes, StaticInput, static_input, unpack
from .values import check_group_index, check_values


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how a layer is computed.

    Attributes:
        dtype: of the model.
        device: of its weights.
        world: tensor parallel processes that share the layer.
    """

    dtype: torch.dtype
    device: torch.device
    world: int

    @property
    def target(self) -> Target:
        """The device as plans name it."""
        return Target.CPU if self.device.type == "cpu" else Target.NPU


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One module of a fused layer, on this process.

    Attributes:
        module: how the checkpoint holds it.
        plan: how it runs.
        weight: its codes, or its float matrix.
        static: how its input is quantised with the checkpoint's numbers.
        quant_bias: what is added to the integer product.
        n: output features.
    """

    module: ModuleScheme
    plan: Plan
    weight: Codes | torch.Tensor
    static: StaticInput | None
    quant_bias: torch.Tensor | None
    n: int

    @property
    def signature(self) -> tuple[Any, ...]:
        """What two parts must share to be multiplied at once."""
        module, weight = self.module, self.weight
        if not isinstance(weight, Codes):
            return (self.plan.kernel, module.rotations)
        return (
            self.plan.kernel,
            module.bits,
            weight.scales.shape[1],
            weight.zeros is None,
            weight.scales.dtype,
            module.input,
            self.static and (self.static.scale, self.static.zero),
            module.rotations,
        )


def make_part(
    module: ModuleScheme, shard: Shard, loaded: dict[str, torch.Tensor], place: Place
) -> Part:
    """Unpack and shard one module.

    Args:
        module: how the checkpoint holds it.
        shard: what of it this process holds.
        loaded: its whole tensors by role.
        place: of the layer.

    Raises:
        CheckpointError: a tensor is missing, has values that no tool writes, or cannot be shared.
    """
    for role, info in module.tensors.items():
        if role not in loaded and role != "bias":
            why = f"{info.file.name} holds it, but vLLM's model did not ask for it"
            raise missing_tensor(info.name, info.file.parent, why)
    check_shard(module, shard)
    chosen = plan(module, place.target)
    if chosen.refused:
        info = module.tensors[CODES_ROLE[module.layout]]
        raise CheckpointError(f"{info.file}: tensor {info.name}: {module.name} is {chosen.note}.")
    if not module.quantised:
        weight = shard.take_rows(loaded["weight"]).narrow(1, *shard.columns)
        weight = weight.to(place.dtype).contiguous()
        return Part(module, chosen, weight, None, None, shard.n)
    if module.activation_order:
        check_group_index(module, loaded["g_idx" if "g_idx" in loaded else "weight_g_idx"])
    codes = unpack(module, loaded)
    check_values(module, codes)
    static = None
    if module.input is not None and not module.input.dynamic:
        static = static_input(module, loaded)
    here = shard_codes(module, codes, shard)
    quant_bias = None
    if module.integer_bias:
        assert static is not None
        quant_bias = _share_of_bias(loaded["quant_bias"], codes, here, static, shard)
    return Part(module, chosen, here, static, quant_bias, shard.n)


def _share_of_bias(
    stored: torch.Tensor, whole: Codes, here: Codes, static: StaticInput, shard: Shard
) -> torch.Tensor:
    """Return what this process adds to its integer product: int32 ``[n]``.

    The checkpoint's number holds the bias, and what the input's zero point adds over all columns.
    Each process corrects its own columns, so that its part of the sum is no larger than it must be,
    and the first one adds the bias.
    """
    if here.codes.shape[1] == whole.codes.shape[1]:
        return shard.take_rows(stored.flatten())
    bias = stored.flatten().long() + static.zero * whole.codes.sum(1, dtype=torch.int64)
    bias = shard.take_rows(bias)
    if shard.columns[0]:
        bias = torch.zeros_like(bias)
    return (bias - static.zero * here.codes.sum(1, dtype=torch.int64)).to(torch.int32)


class Run(torch.nn.Module):
    """Neighbouring parts of a layer that are multiplied at once."""

    def __init__(
        self,
        kernel: LinearKernel,
        rotations: Sequence[Rotation],
        order: torch.Tensor | None,
        index: TensorIndex,
        own_bias: bool,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.own_bias = own_bias
        self.order: torch.Tensor | None
        self.register_buffer("order", order, persistent=False)
        before = [Rotate(each, index) for each in rotations if each.location == "input"]
        after = [Rotate(each, index) for each in rotations if each.location == "output"]
        self.before, self.after = torch.nn.ModuleList(before), torch.nn.ModuleList(after)

    def forward(self, x: torch.Tensor, add_bias: bool) -> torch.Tensor:
        """Return ``[tokens, n]`` of ``[tokens, k]``."""
        for rotate in self.before:
            x = rotate(x)
        if self.order is not None:
            x = x.index_select(-1, self.order)
        out: torch.Tensor = self.kernel(x, add_bias and not self.own_bias)
        for rotate in self.after:
            out = rotate(out)
        return out


def make_runs(
    parts: Sequence[Part],
    columns: int,
    bias: torch.Tensor | None,
    place: Place,
    index: TensorIndex,
) -> torch.nn.ModuleList:
    """Join neighbours that can be multiplied at once, and make their kernels.

    Args:
        parts: in the order of the output.
        columns: input features of this process.
        bias: ``[n]`` of all parts, in the model's type.
        place: of the layer.
        index: tensors of the checkpoint.

    Raises:
        CheckpointError: a rotation reaches over several processes.
    """
    groups: list[list[Part]] = []
    for part in parts:
        if groups and _joins(groups[-1][-1], part):
            groups[-1].append(part)
        else:
            groups.append([part])
    first, runs = 0, []
    for group in groups:
        n = sum(part.n for part in group)
        own = None if bias is None else bias[first : first + n].clone()
        _check_rotations(group[0].module, columns, place)
        runs.append(_run(group, own, place, index))
        first += n
    return torch.nn.ModuleList(runs).to(place.device)


def apply_runs(runs: Any, rows: torch.Tensor, add_bias: bool) -> torch.Tensor:
    """Return ``[tokens, n]`` of ``[tokens, k]``; ``runs`` are those of :func:`make_runs`."""
    parts = [run(rows, add_bias) for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _joins(left: Part, right: Part) -> bool:
    if left.signature != right.signature:
        return False
    if any(rotation.location == "output" for rotation in left.module.rotations):
        return False
    if not (isinstance(left.weight, Codes) and isinstance(right.weight, Codes)):
        return True
    orders = left.weight.order, right.weight.order
    if orders[0] is None or orders[1] is None:
        return orders[0] is orders[1]
    return torch.equal(orders[0], orders[1])


def _run(group: Sequence[Part], bias: torch.Tensor | None, place: Place, index: TensorIndex) -> Run:
    one = group[0]
    order = None
    if isinstance(one.weight, Codes):
        codes = [part.weight for part in group if isinstance(part.weight, Codes)]
        joined, order = _join(codes), one.weight.order
        biases = [part.quant_bias for part in group if part.quant_bias is not None]
        operand = Operand(
            codes=joined,
            bits=one.module.bits,
            group=joined.codes.shape[1] // joined.scales.shape[1],
            input=one.module.input,
            static=one.static,
            quant_bias=torch.cat(biases) if biases else None,
            bias=bias,
            dtype=place.dtype,
            device=place.device,
        )
        kernel = make_kernel(one.plan.kernel, operand)
    else:
        matrices = [part.weight for part in group if isinstance(part.weight, torch.Tensor)]
        kernel = make_float_kernel(torch.cat(matrices), bias, place.device)
    return Run(kernel, one.module.rotations, order, index, one.module.integer_bias)


def _join(codes: Sequence[Codes]) -> Codes:
    if len(codes) == 1:
        return codes[0]
    zeros = [part.zeros for part in codes if part.zeros is not None]
    return Codes(
        torch.cat([part.codes for part in codes]),
        torch.cat([part.scales for part in codes]),
        torch.cat(zeros) if zeros else None,
        codes[0].order,
    )


def _check_rotations(module: ModuleScheme, columns: int, place: Place) -> None:
    """Refuse rotations that reach over the parts of several processes.

    Raises:
        CheckpointError: they do.
    """
    world = place.world
    for rotation in module.rotations:
        here = columns if rotation.location == "input" else module.n // world
        whole = module.k if rotation.location == "input" else module.n
        if here != whole and here % rotation.block:
            info = module.tensors[CODES_ROLE[module.layout]]
            raise CheckpointError(
                f"{info.file}: tensor {info.name}: the {rotation.location} of {module.name} is "
                f"rotated at run time in blocks of {rotation.block} ({rotation.name}), and {world} "
                f"tensor parallel processes hold {here} of its {whole} features; expected whole "
                "blocks. Serve it with --tensor-parallel-size 1, or quantise the model with "
                "smaller blocks (transform_block_size)."
            )
