"""Experts of a checkpoint, one by one, where transformers has one module of fused weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ascend_plugin.weight_tools.errors import WeightToolError

_PARTS = ("gate_proj", "up_proj", "down_proj")
_NAME = re.compile(rf"(?P<fused>.+\.experts)\.(?P<index>\d+)\.(?P<part>{'|'.join(_PARTS)})")


@dataclass(frozen=True, slots=True)
class ExpertName:
    """Where a module of a checkpoint belongs.

    Attributes:
        fused: name of transformers' module of all experts of a layer.
        index: of the expert.
        part: one of its three matrices.
    """

    fused: str
    index: int
    part: str

    @classmethod
    def of(cls, name: str) -> ExpertName | None:
        """Read a module's name; None: it is no expert's."""
        match = _NAME.fullmatch(name)
        return None if match is None else cls(match["fused"], int(match["index"]), match["part"])


class MeantExperts(torch.nn.Module):
    """Stands in for a module of fused experts: ``down(act(gate(x)) * up(x))``, weighted and added.

    Its arguments are those of transformers' experts (``Qwen3MoeExperts``, ``DeepseekV3NaiveMoe``).
    """

    def __init__(
        self, experts: Sequence[Mapping[str, torch.nn.Module]], activation: Callable[..., Any]
    ) -> None:
        """Take three linear layers of each expert."""
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.ModuleDict(dict(each)) for each in experts)
        self.activation = activation

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Route ``[tokens, hidden]`` to experts ``[tokens, top_k]``."""
        out = torch.zeros_like(hidden_states)
        for index in range(len(self.experts)):
            expert: Any = self.experts[index]
            token, place = torch.where(top_k_index == index)
            if not len(token):
                continue
            x = hidden_states[token]
            y = expert["down_proj"](self.activation(expert["gate_proj"](x)) * expert["up_proj"](x))
            out.index_add_(0, token, (y * top_k_weights[token, place, None]).to(out.dtype))
        return out


def replace_experts(
    model: torch.nn.Module, names: Iterable[str], linear: Callable[[str], torch.nn.Module]
) -> None:
    """Give a model of transformers the experts of a checkpoint.

    Args:
        model: whose modules of fused experts are replaced.
        names: modules of the checkpoint; those that are no expert's are left out.
        linear: makes the layer of a name.

    Raises:
        WeightToolError: an expert lacks a matrix, or the model has no such module.
    """
    layers: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        if (place := ExpertName.of(name)) is not None:
            layers.setdefault(place.fused, {}).setdefault(place.index, {})[place.part] = name
    for fused, found in layers.items():
        own: Any = _fused_module(model, fused)
        for index in range(int(own.num_experts)):
            lacking = [part for part in _PARTS if part not in found.get(index, {})]
            if lacking:
                raise WeightToolError(
                    f"the checkpoint has no {fused}.{index}.{lacking[0]}; the model of its "
                    f"config.json has {own.num_experts} experts. Copy or download it again."
                )
        experts = [
            {part: linear(found[index][part]) for part in _PARTS}
            for index in range(int(own.num_experts))
        ]
        parent, _, last = fused.rpartition(".")
        setattr(model.get_submodule(parent), last, MeantExperts(experts, own.act_fn))


def _fused_module(model: torch.nn.Module, name: str) -> torch.nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise WeightToolError(
            f"the checkpoint has experts {name}, the model of its config.json has none."
        ) from error
    if not hasattr(module, "num_experts") or not hasattr(module, "act_fn"):
        raise WeightToolError(
            f"{name} is a {type(module).__name__}, whose experts are not read here. Judge a model "
            "such as Qwen3-MoE or DeepSeek-V3."
        )
    return module
