"""vLLM's mixtures of experts on quantised weights: loading, sharding and execution."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from .check import CODES_ROLE
from .errors import CheckpointError
from .linear import make_holder
from .runs import Part, Place, apply_runs, make_part, make_runs
from .scheme import ModuleScheme
from .shards import Shard
from .target import Target
from .tensors import TensorIndex
from .unpack import Codes

#: vLLM's names of an expert's three modules, by the names of its two weights.
_WEIGHTS = {"w13": ("w1", "w3"), "w2": ("w2",)}


class Expert(NamedTuple):
    """The modules of one expert, by vLLM's names for them: gate, down and up."""

    w1: ModuleScheme
    w2: ModuleScheme
    w3: ModuleScheme


def why_not(moe: FusedMoEConfig, spread: bool = False) -> list[str]:
    """Return the reasons why the plugin does not serve a mixture of experts; none: it does.

    Args:
        moe: of the layer.
        spread: whether experts may be on several devices that all have every token.
    """
    parallel = moe.moe_parallel_config
    reasons = [
        (
            parallel.use_ep and not spread,
            "experts spread over devices (leave --enable-expert-parallel out)",
        ),
        (
            parallel.use_ep and parallel.dp_size > 1,
            "experts spread over data parallel groups (set --data-parallel-size 1)",
        ),
        (
            parallel.use_ep and parallel.pcp_size > 1,
            "experts spread over context parallel groups (set --prefill-context-parallel-size 1)",
        ),
        (
            parallel.is_sequence_parallel,
            "sequence parallelism (set another --all2all-backend)",
        ),
        (parallel.enable_eplb, "balancing of experts over devices (leave --enable-eplb out)"),
        (moe.has_bias, "experts with a bias"),
        (moe.is_lora_enabled, "LoRA (leave --enable-lora out)"),
        (moe.activation != MoEActivation.SILU, f"activation {moe.activation.value!r}, not SwiGLU"),
    ]
    return [reason for wrong, reason in reasons if wrong]


class QuantisedExpertsMethod(FusedMoEMethodBase):
    """Loads the tensors of every expert as they are, and repacks them once."""

    def __init__(self, moe: FusedMoEConfig, experts: Sequence[Expert], index: TensorIndex) -> None:
        """Keep what the checkpoint holds.

        Args:
            moe: of the layer.
            experts: in their order.
            index: tensors of the checkpoint.

        Raises:
            CheckpointError: a mixture of experts that the plugin does not serve quantised.
        """
        super().__init__(moe)
        self.experts, self.index = tuple(experts), index
        if reasons := why_not(moe):
            raise _refused(self.experts[0].w1, ", ".join(reasons))

    @property
    def is_monolithic(self) -> bool:
        """Experts are chosen by vLLM's router, and come as arguments."""
        return False

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return nothing: no kernel of vLLM's is used."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer a parameter for every name that vLLM will load; arguments are vLLM's."""
        parallel = self.moe.moe_parallel_config
        layer.ascend_place = Place(params_dtype, torch.empty(0).device, int(parallel.tp_size))
        first = int(parallel.tp_rank) * intermediate_size_per_partition
        inner, outer = (first, intermediate_size_per_partition), (0, hidden_size)
        layer.ascend_shards = {
            "w1": Shard((inner,), outer),
            "w2": Shard((outer,), inner),
            "w3": Shard((inner,), outer),
        }
        intermediate = intermediate_size_per_partition * int(parallel.tp_size)
        for expert in self.experts:
            _check_size(expert.w1, intermediate, hidden_size)
            _check_size(expert.w2, hidden_size, intermediate)
            _check_size(expert.w3, intermediate, hidden_size)
        layer.ascend_loaded = [{name: {} for name in Expert._fields} for _ in self.experts]
        for weight, names in _WEIGHTS.items():
            roles = {
                role: info
                for expert in self.experts
                for name in names
                for role, info in getattr(expert, name).tensors.items()
            }
            for role, info in roles.items():
                holder = make_holder(info)
                holder.weight_loader = functools.partial(_keep, layer.ascend_loaded, role)
                layer.register_parameter(f"{weight}_{role}", holder)
        layer.ascend_roles = [name for name, _ in layer.named_parameters() if name.startswith("w")]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Unpack, shard and repack the weights, and drop what was loaded."""
        place: Place = layer.ascend_place
        parts = []
        for expert, loaded in zip(self.experts, layer.ascend_loaded, strict=True):
            parts.append(
                {
                    name: make_part(
                        getattr(expert, name), layer.ascend_shards[name], loaded[name], place
                    )
                    for name in Expert._fields
                }
            )
            loaded.clear()
        for name in layer.ascend_roles:
            delattr(layer, name)
        del layer.ascend_loaded
        make = _CpuExperts if place.target is Target.CPU else _NpuExperts
        layer.ascend_experts = make(parts, layer.ascend_shards, place, self.index)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the sum of each token's experts; arguments as in ``FusedMoEMethodBase``."""
        if layer.apply_router_weight_on_input:
            # Defined for one expert per token.
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        out: torch.Tensor = layer.ascend_experts(x, topk_weights, topk_ids)
        return out


def _keep(
    loaded: list[dict[str, dict[str, torch.Tensor]]],
    role: str,
    param: torch.nn.Parameter,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """Keep a loaded tensor until all are there; vLLM calls this per tensor of the checkpoint."""
    loaded[expert_id][shard_id][role] = loaded_weight
    return True if return_success else None


def _check_size(module: ModuleScheme, n: int, k: int) -> None:
    if (module.n, module.k) != (n, k):
        info = module.tensors[CODES_ROLE[module.layout]]
        raise CheckpointError(
            f"{info.file}: tensor {info.name} {list(info.shape)} makes {module.name} {module.n} "
            f"output and {module.k} input features, expected {n} and {k} (config.json). The files "
            "belong to another model: download the checkpoint again."
        )


def _refused(module: ModuleScheme, reason: str) -> CheckpointError:
    info = module.tensors[CODES_ROLE[module.layout]]
    return CheckpointError(
        f"{info.file}: tensor {info.name}: {module.name} is an expert of scheme "
        f"{module.scheme.value} ({module.source}) that is not served: {reason}."
    )


class _CpuExperts(torch.nn.Module):
    """Every expert as a linear layer of its own, of whatever schemes it has."""

    def __init__(
        self,
        parts: Sequence[dict[str, Part]],
        shards: dict[str, Shard],
        place: Place,
        index: TensorIndex,
    ) -> None:
        super().__init__()
        self.gate_up, self.down = torch.nn.ModuleList(), torch.nn.ModuleList()
        for part in parts:
            columns = {name: shard.columns[1] for name, shard in shards.items()}
            both = [part["w1"], part["w3"]]
            self.gate_up.append(make_runs(both, columns["w1"], None, place, index))
            self.down.append(make_runs([part["w2"]], columns["w2"], None, place, index))

    def forward(
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        """Return ``[tokens, hidden]``: rows are gathered by expert, and added in float32."""
        top_k = experts.shape[1]
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self.down)).tolist()
        weights = weights.flatten().float()
        out = torch.zeros(x.shape, dtype=torch.float32)
        first = 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            picked = order[first : first + count]
            first += count
            tokens = picked // top_k
            gate, up = apply_runs(self.gate_up[expert], x[tokens], False).chunk(2, -1)
            inner = (torch.nn.functional.silu(gate.float()) * up.float()).to(x.dtype)
            result = apply_runs(self.down[expert], inner, False).float()
            out.index_add_(0, tokens, result * weights[picked, None])
        return out.to(x.dtype)


class _NpuExperts(torch.nn.Module):
    """All experts in products of runs of rows, which want them to be of one scheme."""

    def __init__(
        self,
        parts: Sequence[dict[str, Part]],
        shards: dict[str, Shard],
        place: Place,
        index: TensorIndex,
    ) -> None:
        super().__init__()
        self.gate_up = _stacked([[part["w1"], part["w3"]] for part in parts], place)
        self.down = _stacked([[part["w2"]] for part in parts], place)

    def forward(
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        """Return ``[tokens, hidden]``."""
        from ascend_plugin.ops.npu import quantised_experts

        ids = experts.to(torch.int32)
        return quantised_experts.swiglu_experts(x, self.gate_up, self.down, weights, ids)


def _stacked(experts: Sequence[Sequence[Part]], place: Place) -> Any:
    """Pack one weight of every expert, each joined from its parts along the output."""
    # Late: this imports torch_npu.
    from ascend_plugin.ops.npu import quantised_experts

    first = experts[0][0]
    for part in (part for parts in experts for part in parts):
        if _kind(part) != _kind(first):
            raise _refused(
                part.module,
                f"the NPU multiplies the experts of a layer at once, and {first.module.name} is "
                f"{first.module.scheme.value} with {first.module.bits} bits and groups of "
                f"{first.module.group}; expected the same here",
            )
    if not isinstance(first.weight, Codes):
        floats = [torch.cat([part.weight for part in parts]) for parts in experts]  # type: ignore[misc]
        return quantised_experts.pack_floats(floats, place.device)
    k = first.weight.codes.shape[1]
    return quantised_experts.pack(
        [_joined(parts) for parts in experts],
        bits=first.module.bits,
        group=k // first.weight.scales.shape[1],
        int8_input=first.plan.runs_as == "W8A8_DYNAMIC",
        dtype=place.dtype,
        device=place.device,
    )


def _kind(part: Part) -> tuple[Any, ...]:
    """Return what the parts of all experts must share."""
    if not isinstance(part.weight, Codes):
        return (part.plan.kernel,)
    return part.plan.kernel, part.module.bits, part.weight.scales.shape[1]


def _joined(parts: Sequence[Part]) -> Any:
    from ascend_plugin.ops.npu.quantised_experts import ExpertCodes

    codes = [part.weight for part in parts if isinstance(part.weight, Codes)]
    zeros = None
    if any(each.zeros is not None for each in codes):
        zeros = torch.cat(
            [
                torch.zeros_like(each.scales, dtype=torch.int8)
                if each.zeros is None
                else each.zeros
                for each in codes
            ]
        )
    return ExpertCodes(
        torch.cat([each.codes for each in codes]),
        torch.cat([each.scales.float() for each in codes]),
        zeros,
    )
