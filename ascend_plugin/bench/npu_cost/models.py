"""Models whose decode step is counted: published shapes, and folders with ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_plugin.bench.decoder_config import CLASSES, Architecture, decoder_config
from ascend_plugin.bench.errors import BenchError

_ARCHITECTURES = {name: architecture for architecture, name in CLASSES.items()}
_BYTES = 2  # weights are bfloat16


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of a dense decoder.

    Attributes:
        name: as the user names it.
        architecture: ``qwen3`` has a norm of every head of query and key, ``llama`` has none.
        layers: of the whole model.
        hidden: width of the residual stream.
        intermediate: width inside the feed-forward block.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: elements of a head.
        source: where the numbers are from.
    """

    name: str
    architecture: Architecture
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    source: str

    def layer_weight_bytes(self) -> int:
        """Return the bytes of one layer's matrices in bfloat16."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (query + 2 * kv) + query * self.hidden
        return _BYTES * (attention + 3 * self.hidden * self.intermediate)

    def attention_flops(self, batch: int, context: int) -> int:
        """Return the operations of both products of one layer's attention in a decode step."""
        return 4 * batch * context * self.heads * self.head_dim

    def config(self, layers: int, positions: int) -> dict[str, Any]:
        """Return a ``config.json`` with fewer layers and a small vocabulary."""
        return decoder_config(
            self.architecture,
            layers=layers,
            hidden=self.hidden,
            intermediate=self.intermediate,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocabulary=VOCABULARY,
            positions=positions,
        )


#: Token ids of the models that run: embeddings and projection belong to no layer.
VOCABULARY = 1024

_HUB = "https://huggingface.co/{}/blob/main/config.json"

#: Known shapes by name.
GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry(
            *("smollm2-135m", "llama", 30, 576, 1536, 9, 3, 64),
            _HUB.format("HuggingFaceTB/SmolLM2-135M"),
        ),
        Geometry(
            *("llama-3.1-8b", "llama", 32, 4096, 14336, 32, 8, 128),
            _HUB.format("meta-llama/Llama-3.1-8B"),
        ),
        Geometry(*("qwen3-8b", "qwen3", 36, 4096, 12288, 32, 8, 128), _HUB.format("Qwen/Qwen3-8B")),
        Geometry(
            *("qwen3-32b", "qwen3", 64, 5120, 25600, 64, 8, 128), _HUB.format("Qwen/Qwen3-32B")
        ),
    )
}


def resolve_geometry(name: str) -> Geometry:
    """Return the shape that a name or a folder stands for.

    Raises:
        BenchError: there is no such model, or its ``config.json`` is no dense decoder's.
    """
    if name in GEOMETRIES:
        return GEOMETRIES[name]
    path = Path(name) / "config.json"
    if not path.is_file():
        raise BenchError(
            f"--model {name}: no known shape, and {path} does not exist. Use "
            f"{', '.join(GEOMETRIES)}, or a folder with config.json."
        )
    return _from_config(name, path, json.loads(path.read_text(encoding="utf-8")))


def _from_config(name: str, path: Path, config: Mapping[str, Any]) -> Geometry:
    kinds = [
        _ARCHITECTURES[one] for one in config.get("architectures", ()) if one in _ARCHITECTURES
    ]
    if not kinds:
        raise BenchError(
            f"--model {name}: {path} says architectures {config.get('architectures')}; counted "
            f"are {', '.join(_ARCHITECTURES)}. Choose another model."
        )
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    missing = [key for key in needed if key not in config]
    if missing:
        raise BenchError(f"--model {name}: {path} has no {', '.join(missing)}; add them.")
    layers, hidden, intermediate, heads = (int(config[key]) for key in needed)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    shape = (layers, hidden, intermediate, heads, kv_heads, head_dim)
    return Geometry(Path(name).resolve().name, kinds[0], *shape, "config.json")
