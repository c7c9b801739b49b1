"""Int8 engines on tiny models, and what the offline model says they must generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engines import Answer
from offline_llama import TOLERANCE, FakeCache, OfflineLlama, worst_difference
from prompts import tokens
from safetensors.torch import load_file, save_file
from tiny_engines import TinyModels, settings

from ascend_plugin.kv_cache.scales import LayerScales, save_kv_scales
from ascend_plugin.mtp.layer import PREFIX

VARIANTS = ("c8d", "c8s", "c8p")

#: One token in so many is "loud": its K and V lie far outside of what the others' scales cover. So
#: each row clearly is an outlier or is none, and a missing patch or a wrong scale shows.
LOUD_EVERY = 7

#: Relative error between those of ordinary rows (1 %) and of loud ones (30 % and more).
THRESHOLD = 0.12


@dataclass(slots=True, eq=False)
class Int8Model:
    """A tiny model with calibrated scales."""

    path: str
    scales: str
    layers: dict[int, LayerScales]
    offline: OfflineLlama

    def config(self, variant: str, **more: Any) -> dict[str, Any]:
        """Return ``additional_config`` for a variant."""
        options: dict[str, Any] = {"variant": variant, **more}
        if {variant, *more.get("layers", {}).values()} & {"c8s", "c8p"}:
            options["scales"] = self.scales
        return {"kv_cache": options}

    def engine(self, variant: str, kv_cache: dict[str, Any] | None = None, **more: Any) -> dict:
        """Return settings of an engine whose whole cache has one variant."""
        config = self.config(variant, **(kv_cache or {})) | more.pop("additional_config", {})
        return settings(
            self.path, kv_cache_dtype="int8_per_token_head", additional_config=config, **more
        )

    def caches(self, *variants: str, block_size: int = 128, code: str = "int4") -> list[FakeCache]:
        """Return what each layer's cache does; one variant stands for all layers."""
        named = variants * self.offline.layers if len(variants) == 1 else variants
        return [self._cache(i, name, block_size, code) for i, name in enumerate(named)]

    def _cache(self, index: int, variant: str, block_size: int, code: str) -> FakeCache:
        layer = self.layers[index]
        thresholds = (3.0 * (layer.k_error or 0.0), 3.0 * (layer.v_error or 0.0))
        return FakeCache(variant, layer.channel_scales(), thresholds, code, block_size)

    def check(
        self, answer: Answer, prompts: list[list[int]], caches: list[FakeCache], run: int = 0
    ) -> None:
        """Every logprob is the offline model's, and every token its choice."""
        outputs = answer.outputs(run)
        assert len(outputs) == len(prompts)
        for prompt, output in zip(prompts, outputs, strict=True):
            off = worst_difference(self.offline, caches, prompt, output)
            assert off < TOLERANCE, f"{len(prompt)} tokens of prompt: off by {off}"


def make_loud(path: str) -> None:
    """Change a tiny model's weights so that some tokens have outlying K and V in every layer.

    Dimension 0 of the hidden state says that a token is loud; only K and V read it.
    """
    file = Path(path) / "model.safetensors"
    weights = load_file(file)
    generator = torch.Generator().manual_seed(7)
    for name, weight in weights.items():
        if name == "model.embed_tokens.weight":
            weight[:, 0] = 0.0
            weight[::LOUD_EVERY, 0] = 2.0
        elif name.endswith(("k_proj.weight", "v_proj.weight")):
            weight[:, 0] = torch.randn(len(weight), generator=generator) * 3.0
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0.0
        elif weight.dim() == 2:
            weight[:, 0] = 0.0
    for name in weights:
        if name.startswith(PREFIX) and name.endswith(("k_proj.weight", "v_proj.weight")):
            # A draft layer is a copy of the first one, or its drafts would be noise.
            weights[name] = weights["model.layers.0." + name.removeprefix(PREFIX)].clone()
    save_file(weights, file, {"format": "pt"})


def calibrate(path: str, file: Path) -> Int8Model:
    """Choose scales for the ordinary tokens of a model and write them into a file."""
    offline = OfflineLlama(path)
    text = tokens(600, offline.config["vocab_size"], seed=99)
    ordinary = torch.tensor([token % LOUD_EVERY != 0 for token in text])
    layers = {}
    for index, seen in enumerate(offline.keys_and_values(text)):
        k_scale, v_scale = (seen[:, ordinary].abs().amax(1) / 127).float()
        layers[index] = LayerScales(k_scale, v_scale, THRESHOLD / 3, THRESHOLD / 3)
    save_kv_scales(file, layers, {})
    return Int8Model(path, str(file), layers, offline)


def median_distance(
    model: Int8Model, text: list[int], one: list[FakeCache], two: list[FakeCache]
) -> float:
    """Return how far apart two caches put the logprobs of a text."""
    a, b = (model.offline.logprobs(text, caches) for caches in (one, two))
    chosen = a.argmax(-1, keepdim=True)
    return float((a.gather(-1, chosen) - b.gather(-1, chosen)).abs().median())


class Int8Models:
    """Calibrated tiny models with loud tokens, written when first asked for."""

    def __init__(self, tiny: TinyModels, folder: Path) -> None:
        self._tiny, self._folder = tiny, folder
        self._known: dict[str, Int8Model] = {}

    def __call__(self, name: str, **arguments: Any) -> Int8Model:
        if name not in self._known:
            path = self._tiny(f"loud {name}", **arguments)
            make_loud(path)
            self._known[name] = calibrate(path, self._folder / f"{name}.safetensors")
        return self._known[name]
