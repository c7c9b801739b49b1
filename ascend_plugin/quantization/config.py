"""vLLM's quantisation method ``ascend``: every quantised checkpoint that the plugin reads."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

# Layers and models are imported where they are needed: every process of vLLM loads this module.
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from ascend_plugin.device import DEVICE_VARIABLE

from .errors import CheckpointError
from .formats import claims, describe
from .formats.modelslim import DESCRIPTION_FILE
from .plan import plan
from .report import log_checkpoint
from .scheme import Checkpoint, ModuleScheme
from .target import Target

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = logging.getLogger(__name__)

METHOD = "ascend"

#: What a user may say with --quantization for a checkpoint that the plugin reads.
_USER_WORDS = (None, METHOD, "compressed-tensors", "awq", "auto_awq", "gptq", "auto_gptq", "inc")

#: Fused modules of models that do not tell vLLM's quantisation about them.
_USUAL_PARTS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


@register_quantization_config(METHOD)
class AscendQuantizationConfig(QuantizationConfig):
    """How a checkpoint is quantised, read from its files before the model is built.

    Attributes:
        kv_cache_scheme: of a compressed-tensors checkpoint; what vLLM calls it.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        """Keep the checkpoint's configuration; its files are read when their folder is known.

        Args:
            config: ``quantization_config``, or ModelSlim's description.
        """
        super().__init__()
        self.config = dict(config or {})
        self.kv_cache_scheme = self.config.get("kv_cache_scheme")
        self.total_num_heads = self.config.get("total_num_heads")
        self.total_num_kv_heads = self.config.get("total_num_kv_heads")
        self.checkpoint: Checkpoint | None = None
        #: Modules of the checkpoint by the name that vLLM's model has for them.
        self._names: dict[str, str] = {}

    def get_name(self) -> str:
        """Return the name for ``--quantization``."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the types that models may compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return vLLM's number for "any device"."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return the file that vLLM reads where ``config.json`` says nothing."""
        return [DESCRIPTION_FILE]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AscendQuantizationConfig:
        """Return the configuration for a checkpoint's own."""
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Claim the checkpoints that the plugin reads; the rest stays vLLM's."""
        if user_quant not in _USER_WORDS or claims(hf_quant_cfg) is None:
            return None
        return METHOD

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the checkpoint; vLLM calls this when an engine is configured, in every process.

        Raises:
            CheckpointError: it cannot be served.
        """
        if self.checkpoint is not None:
            return
        folder = _folder(model_name, revision)
        found = describe(folder, None if (folder / DESCRIPTION_FILE).is_file() else self.config)
        if found is None:
            raise CheckpointError(
                f"{folder}: --quantization {METHOD} was asked for, but the checkpoint has neither "
                f"{DESCRIPTION_FILE} nor a quantization_config that the plugin reads; expected "
                "ModelSlim, compressed-tensors, AWQ or GPTQ. Leave --quantization out."
            )
        self.checkpoint = found
        self._names = {name: name for name in found.modules}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Learn the names that a model has for the checkpoint's modules."""
        rename = hf_to_vllm_mapper.get_rename_mapper()
        mapped = {rename.map_name(f"{name}.weight"): own for name, own in self._names.items()}
        self._names |= {
            name.removesuffix(".weight"): own for name, own in mapped.items() if name is not None
        }

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Leave out tensors that the plugin reads itself; keep ``g_idx``, which vLLM would drop."""
        from vllm.model_executor.models.utils import WeightsMapper

        unused = sorted(self.checkpoint.unused) if self.checkpoint else []
        if not unused:
            return WeightsMapper()
        pattern = re.compile(f"^(?:{'|'.join(re.escape(name) for name in unused)})$")
        return WeightsMapper(orig_to_new_regex={pattern: None})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how a layer of the model is loaded and multiplied.

        Raises:
            CheckpointError: the checkpoint does not say, or says what cannot be served.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if isinstance(layer, LinearBase):
            modules = self._modules(prefix)
            if not modules:
                raise self._unknown(prefix)
            return self._linear(modules) or UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead):
            return self._linear(self._modules(prefix))
        if isinstance(layer, VocabParallelEmbedding):
            _refuse_quantised(self._modules(prefix), "an embedding")
            return None
        return self._attention(layer)

    def _linear(self, modules: list[ModuleScheme]) -> QuantizeMethodBase | None:
        if self.checkpoint is None or not any(each.quantised or each.rotations for each in modules):
            return None
        from .linear import QuantisedLinearMethod

        return QuantisedLinearMethod(modules, self.checkpoint.index)

    def _modules(self, prefix: str) -> list[ModuleScheme]:
        """Return the checkpoint's modules of a layer; empty: it has none."""
        checkpoint = self._checkpoint()
        if prefix in self._names:
            return [checkpoint.modules[self._names[prefix]]]
        before, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last) or _USUAL_PARTS.get(last, [])
        names = [f"{before}.{part}" if before else part for part in parts]
        found = [self._names[name] for name in names if name in self._names]
        if found and len(found) != len(names):
            missing = next(name for name in names if name not in self._names)
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {missing}.weight is missing; expected because "
                f"{prefix} of the model is made of {', '.join(parts)}. Download the checkpoint "
                "again."
            )
        return [checkpoint.modules[name] for name in found]

    def _checkpoint(self) -> Checkpoint:
        if self.checkpoint is None:
            raise RuntimeError("maybe_update_config was not called: this is a bug of the plugin.")
        return self.checkpoint

    def _unknown(self, prefix: str) -> CheckpointError:
        checkpoint = self._checkpoint()
        return CheckpointError(
            f"{checkpoint.folder}: the model has a linear layer {prefix}, of which the checkpoint "
            f"has no tensor; expected {prefix}.weight or its quantised form. The files belong to "
            "another model, or the model needs a name mapping that the plugin does not know."
        )

    def _experts(self, layer: Any, prefix: str) -> QuantizeMethodBase:
        """Return how a layer's experts are loaded and multiplied."""
        from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

        checkpoint = self._checkpoint()
        inside = [own for name, own in self._names.items() if name.startswith(f"{prefix}.")]
        modules = [checkpoint.modules[name] for name in inside]
        if not any(each.quantised or each.rotations for each in modules):
            return UnquantizedFusedMoEMethod(layer.moe_config)
        from .experts import Expert, QuantisedExpertsMethod

        parts = layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name
        experts = []
        for number in range(layer.moe_config.num_experts):
            names = [f"{prefix}.{number}.{part}" for part in parts]
            for name in names:
                if name not in self._names:
                    raise CheckpointError(
                        f"{checkpoint.folder}: tensor {name}.weight is missing; expected because "
                        f"{modules[0].name} is a quantised expert beside it. Experts are served "
                        "from a tensor each, not from one for all. Download the checkpoint again, "
                        "or quantise the model with another tool."
                    )
            experts.append(Expert(*(checkpoint.modules[self._names[name]] for name in names)))
        return QuantisedExpertsMethod(layer.moe_config, experts, checkpoint.index)

    def _attention(self, layer: torch.nn.Module) -> QuantizeMethodBase | None:
        """Return how fp8 scales of a KV cache are loaded; the plugin reads int8 ones elsewhere."""
        from vllm.model_executor.layers.attention import Attention

        scheme = self.kv_cache_scheme
        if not isinstance(layer, Attention) or not scheme or scheme.get("type") != "float":
            return None
        from vllm.model_executor.layers.quantization.compressed_tensors import (
            compressed_tensors,
        )

        method: QuantizeMethodBase = compressed_tensors.CompressedTensorsKVCacheMethod(self)
        return method


def _refuse_quantised(modules: list[ModuleScheme], what: str) -> None:
    for module in modules:
        if module.quantised or module.rotations:
            info = next(iter(module.tensors.values()))
            raise CheckpointError(
                f"{info.file}: tensor {info.name}: {module.name} is {what} of scheme "
                f"{module.scheme.value} ({module.source}); expected FLOAT: only linear layers and "
                "experts are served quantised. Quantise the model without it."
            )


def _folder(model: str, revision: str | None) -> Path:
    """Return the local folder of a checkpoint; one of a hub is downloaded."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json"]
    return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))


def adopt(vllm_config: Any, target: Target) -> None:
    """Give an engine its quantisation where vLLM does not find it: ModelSlim without any flag.

    Args:
        vllm_config: of an engine that is being configured.
        target: what it will run on.

    Raises:
        CheckpointError: the checkpoint cannot be served.
    """
    model = vllm_config.model_config
    if model is None:
        return
    quant_config = vllm_config.quant_config
    described = Path(model.model).is_dir() and (Path(model.model) / DESCRIPTION_FILE).is_file()
    if quant_config is None and described:
        quant_config = AscendQuantizationConfig()
        quant_config.maybe_update_config(model.model)
        model.quantization = METHOD
        vllm_config.quant_config = quant_config
    if isinstance(quant_config, AscendQuantizationConfig) and quant_config.checkpoint is not None:
        _refuse_unserved(quant_config.checkpoint, target)
        log_checkpoint(quant_config.checkpoint, target)
    elif quant_config is not None:
        logger.info(
            "Quantisation %r is served by vLLM's own code, not by the plugin.", model.quantization
        )


def _refuse_unserved(checkpoint: Checkpoint, target: Target) -> None:
    """Refuse, before a worker exists, modules that the device does not serve.

    Raises:
        CheckpointError: there are some.
    """
    for module in checkpoint.modules.values():
        planned = plan(module, target)
        if planned.refused:
            raise CheckpointError(
                f"{checkpoint.folder}: {module.name} ({module.scheme.value} of {module.source}) is "
                f"{planned.note}. See ascend-plugin inspect --device {target}; set "
                f"{DEVICE_VARIABLE}=cpu to serve on the CPU, or quantise the model otherwise."
            )
