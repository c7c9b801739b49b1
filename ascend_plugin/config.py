"""``--additional-config``: the plugin's own settings, checked at the boundary.

vLLM's flags come first; only what they cannot say is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .ops.dispatch import Policy

#: Keys that vLLM itself keeps in ``additional_config``; they are not ours to refuse.
VLLM_KEYS = frozenset(
    {
        "gdn_prefill_backend",
        "kda_decode_backend",
        "kda_prefill_backend",
        "kda_prefill_checkpoint",
        "kda_spec_decode_backend",
    }
)


class ConfigError(ValueError):
    """The configuration cannot be served; the message names path, value and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class OpsConfig(_Section):
    """Which implementation of the operators runs."""

    implementation: Policy = Field(
        default="auto",
        description="auto: the best that this machine supports; reference: plain torch, to check "
        "a result; native: the native CPU kernels or an error.",
    )


class WeightsConfig(_Section):
    """The weights in memory."""

    huge_pages: bool = Field(
        default=True,
        description="CPU: move loaded weights to transparent huge pages, where the kernel can "
        "(Linux 6.1 and later).",
    )


#: How an int8 KV cache is scaled; see docs/pages.md.
Variant = Literal["c8d", "c8s", "c8p"]
LayerVariant = Literal["c8d", "c8s", "c8p", "auto"]

#: The flag that makes the KV cache int8; the settings below say how.
INT8_DTYPE = "int8_per_token_head"


class KVCacheConfig(_Section):
    """The KV cache in memory, and how an int8 one is scaled."""

    huge_pages: bool = Field(
        default=True,
        description="CPU: ask the kernel for transparent huge pages (1.1 to 1.3 times faster "
        "decode).",
    )
    variant: Variant | None = Field(
        default=None,
        description="c8d: a scale per token and kv head, computed when it is written; c8s: static "
        "scales per channel; c8p: c8s with 4-bit patches for outlier tokens. null: c8s if the "
        "checkpoint has static scales, else c8d.",
    )
    scales: str | None = Field(
        default=None,
        min_length=1,
        description="file of static scales, made by 'ascend-plugin calibrate kv'; null: those of "
        "the checkpoint.",
    )
    patch_code: Literal["int4", "e3m0"] = Field(
        default="int4", description="c8p: how 4 bits hold an element of a residual."
    )
    patch_threshold: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="c8p: relative error from which on a token is patched; null: 3 times the "
        "layer's calibrated mean.",
    )
    layers: dict[str, LayerVariant] = Field(
        default_factory=dict,
        description="variants of some layers, by index ('0', '0-3', '-1' is the last) or glob of "
        "the layer's name; 'auto' leaves them unquantised. Later entries win.",
    )
    precision: Literal["exact", "fast"] = Field(
        default="exact",
        description="products of query and weights with int8 pages: exact: in 16 bits; fast: in 8.",
    )

    @model_validator(mode="after")
    def _refuse_idle_settings(self) -> KVCacheConfig:
        """Refuse settings that no layer would use: they are mistakes."""
        used = {self.variant, *self.layers.values()}
        # Without a variant the checkpoint may still choose c8s, never c8p.
        if self.scales is not None and not used & {"c8s", "c8p"}:
            raise ValueError(
                f"kv_cache.scales={self.scales!r} is given, but no layer uses static scales. Set "
                "kv_cache.variant to 'c8s' or 'c8p', or leave kv_cache.scales out."
            )
        for name in ("patch_code", "patch_threshold"):
            value = getattr(self, name) if name in self.model_fields_set else None
            if value is not None and "c8p" not in used:
                raise ValueError(
                    f"kv_cache.{name}={value!r} is given, but no layer has patches. Set "
                    f"kv_cache.variant to 'c8p', or leave kv_cache.{name} out."
                )
        for pattern in self.layers:
            if not pattern.strip():
                raise ValueError(
                    f"kv_cache.layers has the pattern {pattern!r}; use an index ('0', '-1'), a "
                    "range ('0-3') or a glob of layer names ('*.layers.0.*')."
                )
        return self

    def int8_settings(self) -> dict[str, Any]:
        """Return what was set of the settings that only an int8 cache has."""
        names = ("variant", "scales", "patch_code", "patch_threshold", "layers", "precision")
        given = {name: getattr(self, name) for name in names if name in self.model_fields_set}
        return {name: value for name, value in given.items() if value not in (None, {})}


class DraftHeadConfig(_Section):
    """Which tokens drafts are chosen among."""

    tokens: int | None = Field(
        default=None,
        ge=0,
        description="how many of the most frequent tokens; 0: the whole vocabulary; null: 12288 "
        "where the checkpoint or a file says which are frequent, else the whole vocabulary.",
    )
    file: str | None = Field(
        default=None,
        min_length=1,
        description="which tokens are frequent, from 'ascend-plugin mtp head'; null: what the "
        "checkpoint says.",
    )

    @model_validator(mode="after")
    def _refuse_an_idle_file(self) -> DraftHeadConfig:
        if self.tokens == 0 and self.file is not None:
            raise ValueError(
                f"speculation.draft_head.file={self.file!r} is given, but tokens=0 asks for the "
                "whole vocabulary. Leave one of them out."
            )
        return self


class SpeculationConfig(_Section):
    """How drafts are made and how many; which proposer drafts is vLLM's --speculative-config."""

    draft_head: DraftHeadConfig = Field(default_factory=DraftHeadConfig)
    adaptive: bool | None = Field(
        default=None,
        description="choose the number of drafts of every step, 0 to num_speculative_tokens, from "
        "running acceptance and times; null: on a CPU, for methods that can.",
    )


class PluginConfig(_Section):
    """Settings of the plugin, the value of ``--additional-config``."""

    device: Literal["auto", "cpu", "npu"] = Field(
        default="auto",
        description="auto: the NPU if torch_npu finds one, else the CPU. cpu and npu: fail when "
        "vLLM starts on the other one.",
    )
    ops: OpsConfig = Field(default_factory=OpsConfig)
    weights: WeightsConfig = Field(default_factory=WeightsConfig)
    kv_cache: KVCacheConfig = Field(default_factory=KVCacheConfig)
    speculation: SpeculationConfig = Field(default_factory=SpeculationConfig)

    @model_validator(mode="after")
    def _refuse_impossible(self) -> PluginConfig:
        if self.device == "npu" and self.ops.implementation == "native":
            raise ValueError(
                "device='npu' and ops.implementation='native' exclude each other: the native "
                "kernels run on CPUs. Use ops.implementation='auto'."
            )
        return self


def parse_config(additional_config: Any) -> PluginConfig:
    """Parse the value of ``--additional-config``.

    Args:
        additional_config: a mapping, as vLLM keeps it.

    Raises:
        ConfigError: unknown keys, wrong types or impossible combinations, all in one message.
    """
    if not isinstance(additional_config, Mapping):
        raise ConfigError(
            f"--additional-config must be a JSON object, got {type(additional_config).__name__}; "
            f"""for example '{{"device": "cpu"}}'."""
        )
    ours = {key: value for key, value in additional_config.items() if key not in VLLM_KEYS}
    try:
        return PluginConfig.model_validate(ours)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        raise ConfigError("--additional-config is not valid: " + " ".join(problems)) from None


def _describe(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"]) or "the object"
    if problem["type"] == "extra_forbidden":
        allowed = ", ".join(sorted(_fields_at(problem["loc"][:-1])))
        return f"{path} is unknown (value {problem['input']!r}); allowed here: {allowed}."
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{path}={problem['input']!r}: {problem['msg']}."


def _fields_at(path: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = PluginConfig
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return list(model.model_fields)
