"""A quantised module in the words that all formats share, from any checkpoint that is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ascend_plugin.quantization.scheme import Checkpoint, ModuleScheme, Scheme, Source
from ascend_plugin.quantization.unpack import StaticInput, static_input, unpack
from ascend_plugin.weight_tools.errors import WeightToolError


@dataclass(frozen=True, slots=True, eq=False)
class PortableModule:
    """One quantised linear module.

    Attributes:
        about: as the checkpoint describes it.
        codes: int8 ``[n, k]``, signed, in the order of the input features.
        scales: float ``[n, groups]``.
        zeros: int8 ``[n, groups]``, signed; None: all zero.
        groups_of: int64 ``[k]``: the group of each input feature; None: they lie in order.
        static: numbers that quantise the input; None: it is not, or per token.
        bias: ``[n]`` or None.
    """

    about: ModuleScheme
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    groups_of: torch.Tensor | None
    static: StaticInput | None
    bias: torch.Tensor | None

    @property
    def grouped(self) -> bool:
        """Whether a scale belongs to less than an output feature."""
        return self.about.group != self.about.k

    def refuse(self, form: str, what: str) -> WeightToolError:
        """Return the error for something that a format cannot say."""
        return WeightToolError(
            f"{self.about.name} ({self.about.scheme} of {self.about.source}) has {what}, which "
            f"{form} cannot say. Quantise the model again with a recipe for {form}, or serve the "
            "checkpoint as it is."
        )


def read_module(checkpoint: Checkpoint, about: ModuleScheme) -> PortableModule:
    """Read and unpack one module.

    Args:
        checkpoint: that holds it.
        about: the module; quantised, without rotations at run time.
    """
    tensors = {role: checkpoint.index.read(info.name) for role, info in about.tensors.items()}
    found = unpack(about, tensors)
    codes, scales, groups_of = found.codes, found.scales, None
    if found.order is not None:
        back = torch.argsort(found.order)
        codes = codes[:, back]
        groups_of = (torch.arange(about.k) // about.group)[back]
    static = bias = None
    if about.input is not None and not about.input.dynamic:
        static = static_input(about, tensors)
    if about.scheme is Scheme.W8A8 and about.source is Source.MODELSLIM:
        assert static is not None
        bias = _modelslim_bias(tensors, codes, scales, static)
        scales = scales / static.scale
    bias = tensors.get("bias", bias)
    return PortableModule(about, codes, scales, found.zeros, groups_of, static, bias)


def _modelslim_bias(
    tensors: dict[str, torch.Tensor], codes: torch.Tensor, deq: torch.Tensor, static: StaticInput
) -> torch.Tensor | None:
    """Return the bias that ``quant_bias`` holds beside the correction for the input's offset."""
    correction = codes.sum(1, dtype=torch.int64) * static.zero
    rest = tensors["quant_bias"].to(torch.int64) + correction
    return rest.float() * deq.flatten().float() if bool(rest.any()) else None
