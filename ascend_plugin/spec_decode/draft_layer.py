"""Whether a checkpoint's MTP layer fits its base, from the headers of its files.

vLLM says that a layer is missing when all of it is; what else is wrong ends in the assertion of a
weight loader, or in drafts from weights that nobody wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ascend_plugin.config import ConfigError
from ascend_plugin.kv_cache.checkpoint import checkpoint_folder
from ascend_plugin.quantization.tensors import FLOAT_TYPES, TensorInfo, read_index

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: How many tensors an error names.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Base:
    """The sizes of a base.

    Attributes:
        layers: of the base; draft layers follow.
        hidden: width of hidden states.
        vocabulary: rows of embedding and head.
    """

    layers: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """How an architecture stores draft layers.

    Attributes:
        prefix: of a draft layer's tensors; ``{layer}`` counts on from the base's, ``{index}`` from
            zero.
        norms: modules of width ``hidden`` beside those of a decoder layer.
        projection: module from hidden state and embedding to ``hidden``.
        copies: modules of the base that may be stored again.
    """

    prefix: str
    norms: tuple[str, ...]
    projection: str
    copies: tuple[str, ...] = ()

    def own(self, base: Base) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Yield module, shape of its weight, and whether it must be there."""
        for norm in self.norms:
            yield norm, (base.hidden,), True
        yield self.projection, (base.hidden, 2 * base.hidden), True
        for copy in self.copies:
            yield copy, (base.vocabulary, base.hidden), False


#: Layouts that are checked, by vLLM's architecture of the draft.
_LAYOUTS = {
    "DeepSeekMTPModel": _Layout(
        "model.layers.{layer}.",
        ("enorm", "hnorm", "shared_head.norm"),
        "eh_proj",
        ("shared_head.head", "embed_tokens"),
    ),
    "MiMoMTPModel": _Layout(
        "model.mtp_layers.{index}.",
        ("token_layernorm", "hidden_layernorm", "final_layernorm"),
        "input_proj",
    ),
}


def check_draft_layers(vllm_config: VllmConfig) -> None:
    """Refuse MTP layers that are not in the checkpoint, or not those of this base.

    Checkpoints that are not here yet, or not in safetensors, are left to vLLM.

    Raises:
        ConfigError: tensors that are missing or of other shapes.
    """
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    if speculative is None or speculative.method != "mtp" or model is None:
        return
    draft = speculative.draft_model_config
    # vLLM configures the draft too, as if it were a model of its own.
    if draft is model or vllm_config.load_config.load_format == "dummy":
        return
    layout = next((_LAYOUTS[name] for name in draft.architectures if name in _LAYOUTS), None)
    folder = checkpoint_folder(draft)
    if layout is None or folder is None or not any(folder.glob("*.safetensors")):
        return
    base = Base(
        int(model.get_total_num_hidden_layers()),
        int(model.get_hidden_size()),
        int(model.get_vocab_size()),
    )
    config: Any = draft.hf_config
    tensors = read_index(folder)
    for index in range(int(config.num_nextn_predict_layers)):
        prefix = layout.prefix.format(layer=base.layers + index, index=index)
        if found := list(problems(tensors, layout, base, prefix)):
            named = "; ".join(found[:_NAMED])
            more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            raise ConfigError(
                f"the MTP layer of {folder} does not fit its base: {named}{more}. Download the "
                "checkpoint again, quantise it with its MTP layer, or leave --speculative-config "
                "out."
            )


def problems(
    tensors: Mapping[str, TensorInfo], layout: _Layout, base: Base, prefix: str
) -> Iterator[str]:
    """Yield what is wrong with one draft layer.

    Args:
        tensors: of the checkpoint, by name.
        layout: of the architecture.
        base: sizes of the base.
        prefix: of the layer's tensors.
    """
    if not any(name.startswith(prefix) for name in tensors):
        yield f"there is no tensor {prefix}*, although config.json promises the layer"
        return
    for module, shape, needed in layout.own(base):
        name = f"{prefix}{module}.weight"
        if name in tensors:
            yield from _wrong_shape(tensors[name], shape, base)
        elif needed and not _has(tensors, prefix + module):
            yield f"{name} is missing"
    yield from _block_problems(tensors, prefix, base)


def _block_problems(tensors: Mapping[str, TensorInfo], prefix: str, base: Base) -> Iterator[str]:
    """Yield how the decoder layer inside differs from the base's last one."""
    last = f"model.layers.{base.layers - 1}."
    weights = [name for name in tensors if name.startswith(last) and _is_weight(name)]
    # One may have experts and the other one network.
    own, of_base = _kind(tensors, prefix), _kind(tensors, last)
    comparable = own is None or own == of_base
    for name in weights:
        inner = name.removeprefix(last)
        if inner.startswith("mlp.") and not comparable:
            continue
        other = prefix + inner
        if other in tensors and {tensors[n].dtype for n in (name, other)} <= set(FLOAT_TYPES):
            yield from _wrong_shape(tensors[other], tensors[name].shape, base)
        elif not _has(tensors, other.rpartition(".")[0]):
            yield f"{other} is missing"


def _kind(tensors: Mapping[str, TensorInfo], prefix: str) -> str | None:
    """Return what a layer has for an MLP; None: nothing."""
    for part in ("mlp.experts.", "mlp.gate_proj."):
        if any(name.startswith(prefix + part) for name in tensors):
            return part
    return None


def _is_weight(name: str) -> bool:
    """Tell weights, quantised or not, from scales of the cache and the like."""
    return name.rpartition(".")[2].startswith(("weight", "qweight"))


def _has(tensors: Mapping[str, TensorInfo], module: str) -> bool:
    """Return whether a module has a weight, however it is quantised."""
    return any(f"{module}.{kind}" in tensors for kind in ("weight", "weight_packed", "qweight"))


def _wrong_shape(info: TensorInfo, wanted: tuple[int, ...], base: Base) -> Iterator[str]:
    if info.dtype in FLOAT_TYPES and info.shape != wanted:
        yield (
            f"{info.name} is {list(info.shape)}, expected {list(wanted)} (hidden size "
            f"{base.hidden}, vocabulary {base.vocabulary})"
        )
