"""What the parsers of all formats share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ascend_plugin.quantization.scheme import Layout, ModuleScheme, Scheme, Source
from ascend_plugin.quantization.tensors import FLOAT_TYPES, TensorIndex

_BITS = {"F32": 32, "BF16": 16, "F16": 16}


def module_tensors(index: TensorIndex, roles: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the roles that every module has tensors for.

    Args:
        index: of the checkpoint.
        roles: last parts of names that count.
    """
    found: dict[str, list[str]] = {}
    for name in index:
        module, _, role = name.rpartition(".")
        if role in roles:
            found.setdefault(module, []).append(role)
    return found


def float_modules(
    index: TensorIndex,
    quantised: Mapping[str, ModuleScheme],
    reason: Callable[[str], str],
) -> dict[str, ModuleScheme]:
    """Return the modules with a float matrix.

    Args:
        index: of the checkpoint.
        quantised: modules that are known already.
        reason: says why a module stays float.
    """
    found = {}
    for name, info in index.items():
        module, _, role = name.rpartition(".")
        if role != "weight" or module in quantised or len(info.shape) != 2:
            continue
        if info.dtype not in FLOAT_TYPES:
            continue
        tensors = {"weight": info}
        if f"{module}.bias" in index:
            tensors["bias"] = index[f"{module}.bias"]
        found[module] = ModuleScheme(
            name=module,
            scheme=Scheme.FLOAT,
            source=Source.FLOAT,
            source_type=info.dtype,
            layout=Layout.FLOAT,
            bits=_BITS[info.dtype],
            n=info.shape[0],
            k=info.shape[1],
            group=info.shape[1],
            symmetric=True,
            tensors=tensors,
            reason=reason(module),
        )
    return found
