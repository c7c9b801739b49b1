"""vLLM's linear layers on quantised weights: loading, sharding and execution."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase

from .check import CODES_ROLE
from .errors import CheckpointError, missing_tensor
from .execute import FloatKernel, LinearKernel, Operand, make_kernel
from .plan import Kernel, Plan, plan
from .rotate import Rotate
from .scheme import ModuleScheme, Rotation, Source
from .shards import Shard, check_shard, shard_codes, shards_of
from .tensors import TensorIndex
from .unpack import Codes, StaticInput, static_input, unpack
from .values import check_group_index, check_values

_SHARD_IDS = {"q": 0, "k": 1, "v": 2}

_TORCH_TYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
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


class QuantisedLinearMethod(LinearMethodBase):
    """Loads the tensors of a layer's modules as they are, and repacks them once.

    The modules of a fused layer may be of different schemes; neighbours that can be multiplied at
    once are joined, the others run one after the other.
    """

    def __init__(self, modules: Sequence[ModuleScheme], index: TensorIndex) -> None:
        """Keep what the checkpoint holds.

        Args:
            modules: of the checkpoint, in the order of the layer's output.
            index: tensors of the checkpoint.
        """
        self.modules = tuple(modules)
        self.index = index

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer a parameter for every name that vLLM will load; arguments are vLLM's."""
        first = 0
        if input_size_per_partition != input_size:
            first = int(layer.tp_rank) * input_size_per_partition
        layer.ascend_columns = (first, input_size_per_partition)
        layer.ascend_dtype = params_dtype
        layer.ascend_loaded = [{} for _ in self.modules]
        for module in self.modules:
            _check_columns(module, input_size)
        roles: dict[str, ModuleScheme] = {}
        for module in self.modules:
            roles |= {role: module for role in module.tensors if role != "bias"}
        for role, module in roles.items():
            dtype = _TORCH_TYPES[module.tensors[role].dtype]
            holder: Any = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            holder.weight_loader = functools.partial(_keep, layer.ascend_loaded, role)
            layer.register_parameter(role, holder)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Unpack, shard and repack the weights, and drop what was loaded."""
        shards = shards_of(layer, self.modules, layer.ascend_columns)
        parts = []
        for module, shard, loaded in zip(self.modules, shards, layer.ascend_loaded, strict=True):
            parts.append(_part(module, shard, loaded, layer))
            loaded.clear()
        for role in {role for module in self.modules for role in module.tensors} - {"bias"}:
            delattr(layer, role)
        del layer.ascend_loaded
        layer.ascend_runs = _runs(parts, layer, self.index)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply ``x [..., k]`` with the layer's weight ``[n, k]``."""
        rows = x.reshape(-1, x.shape[-1])
        runs = layer.ascend_runs
        parts = [run(rows, bias is not None) for run in runs]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> Any:
        """Refuse to share an embedding's matrix with a quantised output.

        Raises:
            CheckpointError: always.
        """
        info = self.modules[0].tensors[CODES_ROLE[self.modules[0].layout]]
        raise CheckpointError(
            f"{info.file}: tensor {info.name} is the quantised output embedding, and config.json "
            "ties it to the input embedding; expected one of them. Set tie_word_embeddings to "
            "false, or quantise the model without lm_head."
        )


def _keep(
    loaded: list[dict[str, torch.Tensor]],
    role: str,
    parameter: torch.nn.Parameter,
    tensor: torch.Tensor,
    shard_id: str | int | None = None,
) -> None:
    """Keep a loaded tensor until all are there; vLLM calls this per tensor of the checkpoint."""
    part = 0 if shard_id is None else _SHARD_IDS.get(str(shard_id), shard_id)
    loaded[int(part)][role] = tensor


def _check_columns(module: ModuleScheme, input_size: int) -> None:
    if module.k != input_size:
        info = module.tensors[CODES_ROLE[module.layout]]
        raise CheckpointError(
            f"{info.file}: tensor {info.name} {list(info.shape)} makes {module.name} {module.k} "
            f"input features, expected {input_size} (config.json). The files belong to another "
            "model: download the checkpoint again."
        )


def _part(module: ModuleScheme, shard: Shard, loaded: dict[str, torch.Tensor], layer: Any) -> _Part:
    """Unpack and shard one module."""
    for role, info in module.tensors.items():
        if role not in loaded and role != "bias":
            why = f"{info.file.name} holds it, but vLLM's model did not ask for it"
            raise missing_tensor(info.name, info.file.parent, why)
    check_shard(module, shard)
    chosen = plan(module)
    if not module.quantised:
        weight = shard.take_rows(loaded["weight"]).narrow(1, *shard.columns)
        weight = weight.to(layer.ascend_dtype).contiguous()
        return _Part(module, chosen, weight, None, None, shard.n)
    if module.activation_order:
        check_group_index(module, loaded["g_idx" if "g_idx" in loaded else "weight_g_idx"])
    codes = unpack(module, loaded)
    check_values(module, codes)
    static = None
    if module.input is not None and not module.input.dynamic:
        static = static_input(module, loaded)
    quant_bias = None
    if chosen.kernel is Kernel.INT8_EXACT:
        quant_bias = shard.take_rows(loaded["quant_bias"].flatten())
        if shard.columns[0]:  # added once, by the first of the processes that share the input
            quant_bias = torch.zeros_like(quant_bias)
    return _Part(module, chosen, shard_codes(module, codes, shard), static, quant_bias, shard.n)


class _Run(torch.nn.Module):
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


def _runs(parts: Sequence[_Part], layer: Any, index: TensorIndex) -> torch.nn.ModuleList:
    """Join neighbours that can be multiplied at once, and make their kernels."""
    groups: list[list[_Part]] = []
    for part in parts:
        if groups and _joins(groups[-1][-1], part):
            groups[-1].append(part)
        else:
            groups.append([part])
    bias = getattr(layer, "bias", None)
    first, runs = 0, []
    for group in groups:
        n = sum(part.n for part in group)
        own = None if bias is None else bias.data[first : first + n].clone()
        _check_rotations(group[0].module, layer)
        runs.append(_run(group, own, layer, index))
        first += n
    return torch.nn.ModuleList(runs)


def _joins(left: _Part, right: _Part) -> bool:
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


def _run(group: Sequence[_Part], bias: torch.Tensor | None, layer: Any, index: TensorIndex) -> _Run:
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
            dtype=layer.ascend_dtype,
        )
        kernel = make_kernel(one.plan.kernel, operand)
    else:
        matrices = [part.weight for part in group if isinstance(part.weight, torch.Tensor)]
        kernel = FloatKernel(torch.cat(matrices), bias)
    # ModelSlim's quant_bias holds the bias.
    own_bias = one.plan.kernel is Kernel.INT8_EXACT and one.module.source is Source.MODELSLIM
    return _Run(kernel, one.module.rotations, order, index, own_bias)


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


def _check_rotations(module: ModuleScheme, layer: Any) -> None:
    """Refuse rotations that reach over the parts of several processes.

    Raises:
        CheckpointError: they do.
    """
    columns, world = layer.ascend_columns[1], int(getattr(layer, "tp_size", 1))
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
