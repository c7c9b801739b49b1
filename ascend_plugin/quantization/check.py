"""Whether the tensors of a module have the shapes and types that its description says."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ascend_plugin.ops.packed_weight import GROUP_MULTIPLE

from .errors import CheckpointError, wrong_tensor
from .scheme import Layout, ModuleScheme, Source
from .tensors import FLOAT_TYPES, TensorInfo

_Shape = tuple[int, ...]

#: Shapes and types that a tensor may have.
_Allowed = tuple[list[_Shape], tuple[str, ...]]

_ONE: list[_Shape] = [(), (1,), (1, 1)]

_INTEGERS = ("I8", "I32", "I64", "F32", "BF16", "F16")

#: Size of a weight by layout, from n, k and codes per int32.
_WEIGHT_SHAPES: dict[Layout, Callable[[int, int, int], _Shape]] = {
    Layout.FLOAT: lambda n, k, pack: (n, k),
    Layout.INT8: lambda n, k, pack: (n, k),
    Layout.NIBBLES_IN: lambda n, k, pack: (n, k // 2),
    Layout.NIBBLES_OUT: lambda n, k, pack: (n // 2, k),
    Layout.INT32_IN: lambda n, k, pack: (n, -(-k // pack)),
    Layout.GPTQ: lambda n, k, pack: (k // pack, n),
    Layout.AWQ: lambda n, k, pack: (k, n // pack),
}

_CODE_TYPES = {
    Layout.FLOAT: FLOAT_TYPES,
    Layout.INT8: ("I8",),
    Layout.NIBBLES_IN: ("I8",),
    Layout.NIBBLES_OUT: ("I8",),
    Layout.INT32_IN: ("I32",),
    Layout.GPTQ: ("I32",),
    Layout.AWQ: ("I32",),
}

#: The role of the tensor with the codes.
CODES_ROLE = {
    Layout.FLOAT: "weight",
    Layout.INT8: "weight",
    Layout.NIBBLES_IN: "weight",
    Layout.NIBBLES_OUT: "weight",
    Layout.INT32_IN: "weight_packed",
    Layout.GPTQ: "qweight",
    Layout.AWQ: "qweight",
}


def check_group(module: str, info: TensorInfo, k: int, group: int, said_by: str) -> None:
    """Refuse groups that do not divide the input features.

    Args:
        module: name of the module.
        info: the tensor of its codes.
        k: input features.
        group: input features that share a scale.
        said_by: where the group size comes from.

    Raises:
        CheckpointError: they do not.
    """
    if group <= 0 or k % group:
        raise CheckpointError(
            f"{info.file}: tensor {info.name}: {module} has {k} input features, which groups of "
            f"{group} ({said_by}) do not divide. Quantise the model with a group size that divides "
            f"{k}, or one scale per output channel."
        )
    if group != k and group % GROUP_MULTIPLE:
        raise CheckpointError(
            f"{info.file}: tensor {info.name}: {module} has groups of {group} input features "
            f"({said_by}); expected a multiple of {GROUP_MULTIPLE}, which the kernels need. "
            f"Quantise the model with groups of {GROUP_MULTIPLE}, 64 or 128."
        )


def check_module(module: ModuleScheme) -> None:
    """Refuse a module whose tensors do not fit its description.

    Raises:
        CheckpointError: with the tensor, its file, what was expected and the remedy.
    """
    codes = module.tensors[CODES_ROLE[module.layout]]
    check_group(module.name, codes, module.k, module.group, f"as {module.source} describes it")
    pack = 32 // module.bits
    shape = _WEIGHT_SHAPES[module.layout](module.n, module.k, pack)
    _expect(codes, [shape], _CODE_TYPES[module.layout], _about(module))
    for role, (shapes, types) in _companions(module).items():
        if role in module.tensors:
            _expect(module.tensors[role], shapes, types, _about(module))


def _about(module: ModuleScheme) -> str:
    group = "per channel" if module.group == module.k else f"groups of {module.group}"
    said = "" if module.scheme.value == module.source_type else f" ({module.source_type})"
    return (
        f"{module.name} is {module.scheme.value}{said}, {module.n} output and {module.k} input "
        f"features, {group}"
    )


def _expect(info: TensorInfo, shapes: Iterable[_Shape], types: tuple[str, ...], why: str) -> None:
    allowed = list(shapes)
    if info.shape in allowed and info.dtype in types:
        return
    listed = " or ".join(str(list(shape)) for shape in allowed)
    raise wrong_tensor(info, f"{'/'.join(types)} {listed}", why)


def _companions(module: ModuleScheme) -> dict[str, _Allowed]:
    """Return allowed shapes and types of everything beside the codes, by role."""
    allowed: dict[str, _Allowed] = {"bias": ([(module.n,)], FLOAT_TYPES)}
    if module.source in _BY_SOURCE:
        allowed |= _BY_SOURCE[module.source](module)
    return allowed


def _rows(module: ModuleScheme) -> list[_Shape]:
    groups = module.k // module.group
    return [(module.n, groups), (module.n,)] if groups == 1 else [(module.n, groups)]


def _modelslim(module: ModuleScheme) -> dict[str, _Allowed]:
    n, rows = module.n, _rows(module)
    # A second scale refines the first, which then is per channel.
    first: list[_Shape] = [(n, 1), (n,)] if "weight_scale_second" in module.tensors else rows
    return {
        "weight_scale": (first, FLOAT_TYPES),
        "weight_offset": (first, _INTEGERS),
        "weight_scale_second": (rows, FLOAT_TYPES),
        "weight_offset_second": (rows, _INTEGERS),
        "input_scale": (_ONE, FLOAT_TYPES),
        "input_offset": (_ONE, _INTEGERS),
        "deq_scale": ([(n,), (n, 1)], ("F32", "I64")),
        "quant_bias": ([(n,), (n, 1)], ("I32",)),
    }


def _compressed_tensors(module: ModuleScheme) -> dict[str, _Allowed]:
    groups = module.k // module.group
    scale = _rows(module) + (_ONE if groups == 1 else [])
    zeros: _Allowed = (scale, ("I8", "I32", "I64"))
    if module.layout is Layout.INT32_IN:
        zeros = ([(-(-module.n * module.bits // 32), groups)], ("I32",))
    return {
        "weight_scale": (scale, FLOAT_TYPES),
        "weight_zero_point": zeros,
        "weight_shape": ([(2,)], ("I32", "I64")),
        "weight_g_idx": ([(module.k,)], ("I32", "I64")),
        "input_scale": (_ONE, FLOAT_TYPES),
        "input_zero_point": (_ONE, ("I8", "I32", "I64")),
    }


def _gptq_or_awq(module: ModuleScheme) -> dict[str, _Allowed]:
    groups = module.k // module.group
    return {
        "scales": ([(groups, module.n)], FLOAT_TYPES),
        "qzeros": ([(groups, module.n * module.bits // 32)], ("I32",)),
        "g_idx": ([(module.k,)], ("I32", "I64")),
    }


_BY_SOURCE = {
    Source.MODELSLIM: _modelslim,
    Source.COMPRESSED_TENSORS: _compressed_tensors,
    Source.GPTQ: _gptq_or_awq,
    Source.AWQ: _gptq_or_awq,
}
