"""vLLM's linear layers on quantised weights: loading, sharding and execution."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase

from .check import CODES_ROLE
from .errors import CheckpointError
from .runs import Place, apply_runs, make_part, make_runs
from .scheme import ModuleScheme
from .shards import shards_of
from .tensors import TensorIndex, TensorInfo

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
        layer.ascend_loaded = [{} for _ in self.modules]
        for module in self.modules:
            _check_columns(module, input_size)
        roles: dict[str, ModuleScheme] = {}
        for module in self.modules:
            roles |= {role: module for role in module.tensors if role != "bias"}
        device = torch.empty(0).device
        layer.ascend_place = Place(params_dtype, device, int(getattr(layer, "tp_size", 1)))
        for role, module in roles.items():
            holder = make_holder(module.tensors[role])
            holder.weight_loader = functools.partial(_keep, layer.ascend_loaded, role)
            layer.register_parameter(role, holder)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Unpack, shard and repack the weights, and drop what was loaded."""
        shards = shards_of(layer, self.modules, layer.ascend_columns)
        parts = []
        for module, shard, loaded in zip(self.modules, shards, layer.ascend_loaded, strict=True):
            parts.append(make_part(module, shard, loaded, layer.ascend_place))
            loaded.clear()
        for role in {role for module in self.modules for role in module.tensors} - {"bias"}:
            delattr(layer, role)
        del layer.ascend_loaded
        bias = getattr(layer, "bias", None)
        if bias is not None:
            bias = bias.data.cpu()
        columns = layer.ascend_columns[1]
        layer.ascend_runs = make_runs(parts, columns, bias, layer.ascend_place, self.index)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply ``x [..., k]`` with the layer's weight ``[n, k]``."""
        rows = x.reshape(-1, x.shape[-1])
        out = apply_runs(layer.ascend_runs, rows, bias is not None)
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


def make_holder(info: TensorInfo) -> Any:
    """Return an empty parameter of the current device for a tensor that vLLM will load."""
    dtype = _TORCH_TYPES[info.dtype]
    return torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)


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
