"""How a checkpoint is quantised, in words that all formats share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from .tensors import TensorIndex, TensorInfo


class Scheme(StrEnum):
    """How the weight and the input of a linear module are kept."""

    FLOAT = "FLOAT"
    W8A8 = "W8A8"
    W8A8_DYNAMIC = "W8A8_DYNAMIC"
    W8A16 = "W8A16"
    W4A16 = "W4A16"
    W4A8 = "W4A8_DYNAMIC"


class Source(StrEnum):
    """Which tool's format holds a module."""

    FLOAT = "float"
    MODELSLIM = "modelslim"
    COMPRESSED_TENSORS = "compressed-tensors"
    AWQ = "awq"
    GPTQ = "gptq"


class Layout(StrEnum):
    """How a file holds the codes of a weight ``[n, k]``."""

    FLOAT = "float [n, k]"
    INT8 = "int8 [n, k]"
    NIBBLES_IN = "two codes per int8 along k, the low nibble first: [n, k/2]"
    NIBBLES_OUT = "two codes per int8 along n, the low nibble first: [n/2, k]"
    INT32_IN = "codes plus half the range, int32 along k, low bits first: [n, k*bits/32]"
    GPTQ = "codes plus zero point, int32 along k, low bits first: [k*bits/32, n]"
    AWQ = "eight codes per int32 along n in the order 0 2 4 6 1 3 5 7: [k, n/8]"


@dataclass(frozen=True, slots=True)
class InputScheme:
    """How the input of a module is quantised to int8.

    Attributes:
        dynamic: a scale per token, computed at run time; else one that the checkpoint holds.
        symmetric: without a zero point.
    """

    dynamic: bool
    symmetric: bool


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotation of a module's input or output at run time.

    Attributes:
        name: of the checkpoint's transform.
        location: ``input`` or ``output``.
        kind: ``hadamard`` (Sylvester, computed here), ``matrix`` (of the checkpoint), ``heads`` or
            ``kronecker`` (QuaRot).
        block: size of the blocks on the diagonal.
        inverse: multiply by the transpose.
        tensors: names of the checkpoint's matrices.
    """

    name: str
    location: str
    kind: str
    block: int
    inverse: bool = False
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModuleScheme:
    """How one linear module of a checkpoint is quantised.

    Attributes:
        name: of the module in the checkpoint.
        scheme: what it is.
        source: which format holds it.
        source_type: the format's own word, for example ``W8A8_MIX`` or ``pack-quantized``.
        layout: of the codes.
        bits: of a weight's code; those of the type if float.
        n: output features.
        k: input features.
        group: input features that share a scale; ``k``: one scale per output feature.
        symmetric: the weight has no zero points.
        tensors: what holds it, by role (``weight``, ``weight_scale``, …).
        input: how the input is quantised; None: it stays as it is.
        zero_shift: GPTQ: what the file's zero points lack (1 in the first format, 0 in v2).
        activation_order: groups are given by ``g_idx``.
        reason: why the module stays float.
        rotations: at run time.
    """

    name: str
    scheme: Scheme
    source: Source
    source_type: str
    layout: Layout
    bits: int
    n: int
    k: int
    group: int
    symmetric: bool
    tensors: Mapping[str, TensorInfo]
    input: InputScheme | None = None
    zero_shift: int = 0
    activation_order: bool = False
    reason: str = ""
    rotations: tuple[Rotation, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in the checkpoint."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def quantised(self) -> bool:
        """Whether the weight has codes."""
        return self.scheme is not Scheme.FLOAT

    @property
    def integer_bias(self) -> bool:
        """Whether a bias is added to the integer product, and holds the module's own bias too."""
        return self.source is Source.MODELSLIM and self.scheme is Scheme.W8A8


@dataclass(frozen=True, slots=True)
class KVScheme:
    """A KV cache that the checkpoint has scales for.

    Attributes:
        kind: ``C8`` or ``fp8``.
        layers: how many layers have scales.
        source: which format holds them.
    """

    kind: str
    layers: int
    source: Source


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A quantised checkpoint.

    Attributes:
        folder: of its files.
        source: its format.
        modules: every module with a weight matrix, by its name in the checkpoint.
        index: its tensors.
        kv: its KV cache.
        notes: what a user should know of it.
        unused: tensors that hold nothing the plugin needs from vLLM's loader.
    """

    folder: Path
    source: Source
    modules: Mapping[str, ModuleScheme]
    index: TensorIndex
    kv: KVScheme | None = None
    notes: tuple[str, ...] = ()
    unused: frozenset[str] = field(default_factory=frozenset)
