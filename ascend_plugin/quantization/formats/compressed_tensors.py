"""compressed-tensors, the format of llm-compressor: ``quantization_config`` in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ascend_plugin.quantization.check import check_module
from ascend_plugin.quantization.errors import (
    DOWNLOAD_AGAIN,
    CheckpointError,
    contradiction,
    missing_tensor,
    unknown_value,
    wrong_tensor,
)
from ascend_plugin.quantization.scheme import (
    Checkpoint,
    InputScheme,
    KVScheme,
    Layout,
    ModuleScheme,
    Scheme,
    Source,
)
from ascend_plugin.quantization.tensors import FLOAT_TYPES, TensorIndex, TensorInfo

from .common import float_modules, module_tensors
from .transforms import find_rotations, rotation_tensors

_ROLES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "bias",
)

#: Tensors that only quantised modules have.
_MARKS = ("weight_packed", "weight_scale", "weight_zero_point", "input_scale")

_STRATEGIES = ("tensor", "channel", "group")


@dataclass(frozen=True, slots=True)
class _Group:
    """One entry of ``config_groups``."""

    name: str
    targets: tuple[str, ...]
    weights: Any
    inputs: Any
    format: str


def claims(config: Mapping[str, Any]) -> bool:
    """Say whether a ``quantization_config`` is compressed-tensors with integers alone."""
    if config.get("quant_method") != "compressed-tensors":
        return False
    groups = config.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        return True  # parse says what is wrong
    for group in groups.values():
        for part in ("weights", "input_activations", "output_activations"):
            about = group.get(part) if isinstance(group, Mapping) else None
            if isinstance(about, Mapping) and about.get("type", "int") != "int":
                return False
        if isinstance(group, Mapping) and group.get("output_activations"):
            return False
    scheme = config.get("kv_cache_scheme")
    return bool(groups) or bool(config.get("transform_config")) or scheme is not None


def parse(index: TensorIndex, config: Mapping[str, Any]) -> Checkpoint:
    """Describe a compressed-tensors checkpoint.

    Args:
        index: its tensors.
        config: ``quantization_config`` of its ``config.json``.

    Raises:
        CheckpointError: the configuration is unknown or does not fit the tensors.
    """
    path = index.folder / "config.json"
    groups = [_group(path, config, name) for name in config.get("config_groups") or {}]
    ignore = [str(target) for target in config.get("ignore") or ()]
    # Matrices of rotations are named like weights of modules.
    matrices = rotation_tensors(config, index)
    whole, index = index, index.without(matrices)
    modules: dict[str, ModuleScheme] = {}
    reasons: dict[str, str] = {}
    for module in _candidates(index):
        chosen = _choose(module, groups)
        ignored = _matches(module, ignore)
        marked = [role for role in _MARKS if f"{module}.{role}" in index]
        if chosen is None or ignored:
            reasons[module] = "ignored by the recipe" if ignored else "no config group targets it"
            if marked:
                raise contradiction(
                    f"{index[f'{module}.{marked[0]}'].file}: tensor {module}.{marked[0]}",
                    "it belongs to a quantised module",
                    f"for {path.name} {module} is float: {reasons[module]}",
                    f"Correct 'ignore' and 'targets' in {path}, or quantise the model again.",
                )
            continue
        modules[module] = _module(path, index, module, chosen)
    modules |= float_modules(index, modules, lambda name: reasons.get(name, "no linear module"))
    rotations, notes = find_rotations(path, config, whole, modules)
    for name, found in rotations.items():
        modules[name] = replace(modules[name], rotations=found)
    return Checkpoint(
        folder=index.folder,
        source=Source.COMPRESSED_TENSORS,
        modules=modules,
        index=whole,
        kv=_kv(config, index),
        notes=notes,
        unused=matrices,
    )


def _group(path: Path, config: Mapping[str, Any], name: str) -> _Group:
    """Validate one config group with compressed-tensors' own models."""
    from compressed_tensors.quantization import QuantizationArgs
    from pydantic import ValidationError

    where = f"{path}: quantization_config.config_groups.{name}"
    about = config["config_groups"][name]
    if not isinstance(about, Mapping) or not about.get("targets") or not about.get("weights"):
        raise CheckpointError(
            f"{where} is {about!r}; expected an object with 'targets' and 'weights'. "
            f"{DOWNLOAD_AGAIN}"
        )
    known = set(QuantizationArgs.model_fields)
    parsed = []
    for part in ("weights", "input_activations"):
        given = about.get(part)
        try:
            # Newer versions write more keys; those that matter here are old.
            parsed.append(
                None
                if given is None
                else QuantizationArgs.model_validate(
                    {key: value for key, value in given.items() if key in known}
                )
            )
        except (ValidationError, AttributeError) as error:
            raise CheckpointError(
                f"{where}.{part} is {given!r}, which compressed-tensors does not accept: {error}. "
                f"{DOWNLOAD_AGAIN}"
            ) from error
    weights, inputs = parsed
    _check_args(where, weights, inputs)
    kind = str(about.get("format") or config.get("format") or "")
    return _Group(name, tuple(about["targets"]), weights, inputs, kind)


def _check_args(where: str, weights: Any, inputs: Any) -> None:
    remedy = "Quantise the model with one of these, or serve it with vLLM's own quantisation."
    if weights.num_bits not in (4, 8):
        raise unknown_value(f"{where}.weights.num_bits", weights.num_bits, ("4", "8"), remedy)
    if _word(weights.strategy) not in _STRATEGIES:
        raise unknown_value(
            f"{where}.weights.strategy", _word(weights.strategy), _STRATEGIES, remedy
        )
    if inputs is None:
        return
    if inputs.num_bits != 8:
        raise unknown_value(f"{where}.input_activations.num_bits", inputs.num_bits, ("8",), remedy)
    allowed = "token" if inputs.dynamic else "tensor"
    if _word(inputs.strategy) != allowed:
        raise unknown_value(
            f"{where}.input_activations.strategy (dynamic: {bool(inputs.dynamic)})",
            _word(inputs.strategy),
            (allowed,),
            remedy,
        )
    if weights.num_bits == 4 and not inputs.dynamic:
        raise unknown_value(
            f"{where}.input_activations.dynamic of a 4-bit weight", False, ("True",), remedy
        )


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


def _candidates(index: TensorIndex) -> list[str]:
    """Return the modules with a weight matrix that is not looked up like an embedding."""
    found = []
    for module, roles in module_tensors(index, _ROLES).items():
        matrix = "weight_packed" in roles or (
            "weight" in roles and len(index[f"{module}.weight"].shape) == 2
        )
        if matrix and "embed" not in module.rpartition(".")[2]:
            found.append(module)
    return found


def _choose(module: str, groups: list[_Group]) -> _Group | None:
    """Return the group of a module: names count before the class ``Linear``."""
    for group in groups:
        if _matches(module, [target for target in group.targets if target != "Linear"]):
            return group
    return next((group for group in groups if "Linear" in group.targets), None)


def _matches(module: str, targets: list[str]) -> bool:
    from compressed_tensors.utils.match import match_name

    return any(match_name(module, target) for target in targets)


def _module(path: Path, index: TensorIndex, module: str, group: _Group) -> ModuleScheme:
    why = f"config group {group.name} ({group.format}) of {path.name} quantises it"
    tensors = {role: index[f"{module}.{role}"] for role in _ROLES if f"{module}.{role}" in index}
    packed = tensors.get("weight_packed")
    codes = packed or index.need(f"{module}.weight", why)
    if packed is None and codes.dtype in FLOAT_TYPES:
        raise contradiction(
            f"{codes.file}: tensor {codes.name}",
            f"it is {codes.dtype}, not quantised",
            why,
            f"Add {module} to 'ignore' in {path}, or quantise the model again.",
        )
    if len(codes.shape) != 2:
        raise wrong_tensor(codes, "a matrix of codes", why)
    index.need(f"{module}.weight_scale", why)
    weights, inputs = group.weights, group.inputs
    n = codes.shape[0]
    k = codes.shape[1] if packed is None else _packed_columns(index, module, codes, weights, why)
    strategy = _word(weights.strategy)
    found = ModuleScheme(
        name=module,
        scheme=_scheme(weights, inputs),
        source=Source.COMPRESSED_TENSORS,
        source_type=f"{group.format}, {strategy}",
        layout=Layout.INT8 if packed is None else Layout.INT32_IN,
        bits=weights.num_bits,
        n=n,
        k=k,
        group=int(weights.group_size) if strategy == "group" else k,
        symmetric=bool(weights.symmetric),
        tensors=tensors,
        input=None if inputs is None else InputScheme(bool(inputs.dynamic), inputs.symmetric),
        activation_order="weight_g_idx" in tensors,
    )
    _check_companions(index, found, why)
    check_module(found)
    return found


def _packed_columns(
    index: TensorIndex, module: str, codes: TensorInfo, weights: Any, why: str
) -> int:
    """Return the input features of a packed weight, which may end within its last int32."""
    shape_info = index.need(f"{module}.weight_shape", why)
    shape = [int(size) for size in index.read(shape_info.name).flatten()]
    pack = 32 // weights.num_bits
    if len(shape) != 2 or shape[0] != codes.shape[0] or -(-shape[1] // pack) != codes.shape[1]:
        raise contradiction(
            f"{codes.file}: tensor {codes.name}",
            f"it is {codes.dtype} {list(codes.shape)}, {pack} codes in an int32",
            f"{shape_info.name} says that the weight is {shape}",
            DOWNLOAD_AGAIN,
        )
    return shape[1]


def _scheme(weights: Any, inputs: Any) -> Scheme:
    if weights.num_bits == 4:
        return Scheme.W4A16 if inputs is None else Scheme.W4A8
    if inputs is None:
        return Scheme.W8A16
    return Scheme.W8A8_DYNAMIC if inputs.dynamic else Scheme.W8A8


def _check_companions(index: TensorIndex, module: ModuleScheme, why: str) -> None:
    """Refuse modules without the scales and zero points of their kind."""
    needed = []
    if not module.symmetric:
        needed.append("weight_zero_point")
    if module.input is not None and not module.input.dynamic:
        needed.append("input_scale")
        if not module.input.symmetric:
            needed.append("input_zero_point")
    for role in needed:
        if role not in module.tensors:
            raise missing_tensor(f"{module.name}.{role}", index.folder, why)


def _kv(config: Mapping[str, Any], index: TensorIndex) -> KVScheme | None:
    scheme = config.get("kv_cache_scheme")
    if not isinstance(scheme, Mapping):
        return None
    layers = sum(name.endswith("self_attn.k_scale") for name in index)
    kind = "C8" if scheme.get("type") == "int" else "fp8"
    return KVScheme(kind, layers, Source.COMPRESSED_TENSORS)
