"""Models to serve: folders with a checkpoint, and shapes with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ascend_plugin.bench.decoder_config import decoder_config
from ascend_plugin.bench.elements import ITEMSIZE, Element
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.serve.drawn_weights import write_w4a16

#: How the weights of drawn models are held.
Weights = Literal["bf16", "w4a16"]

SMOLLM2 = "smollm2"
QWEN3 = "qwen3-28x1024"
DEFAULT_MODELS = (SMOLLM2, QWEN3)

#: Deep and narrow: at a context of some thousand tokens most of a step is attention, which a tiny
#: model cannot show. The vocabulary is small because its projection is no part of the question.
_QWEN3_CONFIG = decoder_config(
    "qwen3",
    layers=28,
    hidden=1024,
    intermediate=3072,
    heads=16,
    kv_heads=8,
    head_dim=128,
    vocabulary=4096,
    positions=40960,
)

#: Models whose weights are drawn at start, by name.
DUMMY_MODELS: dict[str, dict[str, Any]] = {QWEN3: _QWEN3_CONFIG}
#: Names of models that are drawn, in all weights.
_DRAWN = {name for dummy in DUMMY_MODELS for name in (dummy, f"{dummy}-w4a16")}


@dataclass(frozen=True, slots=True)
class ServeModel:
    """A model on disk.

    Attributes:
        name: as the user named it.
        path: folder with ``config.json``.
        load_format: vLLM's; ``dummy`` draws random weights.
        config: what the memory estimate and the prompts need of ``config.json``.
    """

    name: str
    path: Path
    load_format: Literal["auto", "dummy"]
    config: Mapping[str, Any]

    @property
    def described(self) -> str:
        """What it is, for ``meta``."""
        return f"{self.name}, drawn weights" if self.name in _DRAWN else str(self.path)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.config["vocab_size"])

    @property
    def max_positions(self) -> int:
        """Longest context."""
        return int(self.config["max_position_embeddings"])

    def token_bytes(self, element: Element) -> int:
        """Bytes of K and V of one token in all layers."""
        heads = int(self.config["num_attention_heads"])
        kv_heads = int(self.config.get("num_key_value_heads") or heads)
        head_dim = int(self.config.get("head_dim") or int(self.config["hidden_size"]) // heads)
        layers = int(self.config["num_hidden_layers"])
        return 2 * layers * kv_heads * head_dim * ITEMSIZE[element]

    def weight_bytes(self, element: Element) -> int:
        """Bytes of the weights, roughly: the files', or those of the dummy's matrices."""
        files = sum(file.stat().st_size for file in self.path.glob("*.safetensors"))
        if files:
            return files
        hidden, layers = int(self.config["hidden_size"]), int(self.config["num_hidden_layers"])
        width = int(self.config.get("intermediate_size", 4 * hidden))
        heads = self.token_bytes(element) // ITEMSIZE[element] // layers
        per_layer = hidden * (3 * width + 3 * heads)
        return ITEMSIZE[element] * (layers * per_layer + 2 * hidden * self.vocabulary)


def resolve_model(
    name: str, scratch: Path, *, weights: Weights = "bf16", option: str = "--model"
) -> ServeModel:
    """Return the model that a name or path stands for.

    Args:
        name: ``smollm2``, a dummy model's name, or a folder with ``config.json``.
        scratch: folder for dummy models.
        weights: how a dummy model's are held.
        option: that named it.

    Raises:
        BenchError: there is no such model, or its configuration lacks what is needed.
    """
    if name in DUMMY_MODELS:
        return _drawn_model(name, scratch, weights)
    if weights != "bf16":
        raise BenchError(
            f"--weights {weights} draws weights, and {option} {name} has its own: use it with "
            f"--model {', '.join(DUMMY_MODELS)}, or name a quantised checkpoint."
        )
    folder = _smollm2_folder() if name == SMOLLM2 else Path(name).resolve()
    if not (folder / "config.json").is_file():
        remedy = (
            f"Run: ascend-plugin model smollm2 {folder}"
            if name == SMOLLM2
            else f"Use a folder with config.json, or one of {', '.join(DEFAULT_MODELS)}."
        )
        raise BenchError(f"{option} {name}: {folder / 'config.json'} does not exist. {remedy}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    needed = ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size")
    missing = [key for key in (*needed, "max_position_embeddings") if key not in config]
    if missing:
        raise BenchError(
            f"{option} {name}: its config.json has no {', '.join(missing)}; bench serve measures "
            "decoder models with attention. Choose another model."
        )
    return ServeModel(name, folder, "auto", config)


def _drawn_model(name: str, scratch: Path, weights: Weights) -> ServeModel:
    """Return a dummy model: vLLM draws floats itself, integers are written."""
    config = DUMMY_MODELS[name]
    if weights == "w4a16":
        folder = scratch / f"{name}-{weights}"
        write_w4a16(folder, config)
        return ServeModel(folder.name, folder, "auto", config)
    folder = scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ServeModel(name, folder, "dummy", config)


def _smollm2_folder() -> Path:
    """Return where the checkpoint is or belongs: below the working folder, or in the checkout."""
    here = Path.cwd() / "models" / "smollm2"
    checkout = Path(__file__).resolve().parents[3] / "models" / "smollm2"
    return checkout if checkout.is_dir() and not here.is_dir() else here
