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


class KVCacheConfig(_Section):
    """The KV cache in memory."""

    huge_pages: bool = Field(
        default=True,
        description="CPU: ask the kernel for transparent huge pages (1.1 to 1.3 times faster "
        "decode).",
    )


class PluginConfig(_Section):
    """Settings of the plugin, the value of ``--additional-config``."""

    device: Literal["auto", "cpu", "npu"] = Field(
        default="auto",
        description="auto: the NPU if torch_npu finds one, else the CPU. cpu and npu: fail when "
        "vLLM starts on the other one.",
    )
    ops: OpsConfig = Field(default_factory=OpsConfig)
    kv_cache: KVCacheConfig = Field(default_factory=KVCacheConfig)

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
