"""Which layer has which variant of an int8 KV cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from ascend_plugin.ops.page_layout import Quantisation

#: Names of variants in the configuration; ``auto`` is vLLM's word for the model's own type.
QUANTISATIONS = {
    "auto": Quantisation.NONE,
    "c8d": Quantisation.C8D,
    "c8s": Quantisation.C8S,
    "c8p": Quantisation.C8P,
}

_INDEX = re.compile(r"(-?\d+)(?:-(-?\d+))?")


class LayerPatternError(ValueError):
    """A pattern of layers cannot be used; the message says what is allowed."""


def layer_variants(
    patterns: Mapping[str, str],
    default: str,
    layers: Mapping[str, int],
    num_layers: int,
    *,
    complete: bool = True,
) -> dict[str, Quantisation]:
    """Return the variant of each layer; later patterns win.

    Args:
        patterns: variant by pattern: an index (``0``; ``-1`` is the last), a range (``0-3``, both
            included) or a glob of names (``*.layers.0.*``).
        default: variant of layers that no pattern matches.
        layers: index by name, of the layers in this process.
        num_layers: of the whole model.
        complete: whether these are all layers; with pipeline parallelism they are not, and a
            pattern may be meant for another process.

    Raises:
        LayerPatternError: an index is outside of the model, a range is empty, or a glob matches
            no layer.
    """
    found = dict.fromkeys(layers, QUANTISATIONS[default])
    for pattern, variant in patterns.items():
        span = _span(pattern, num_layers)
        if span is None:
            matched = [name for name in layers if fnmatchcase(name, pattern)]
        else:
            matched = [name for name, index in layers.items() if index in span]
        if not matched and span is None and complete:
            raise LayerPatternError(
                f"kv_cache.layers has the pattern {pattern!r}, which matches no layer; names are "
                f"like {next(iter(layers), 'model.layers.0.self_attn.attn')!r}. Use such a name, "
                "a glob of it, an index ('0', '-1') or a range ('0-3')."
            )
        found.update(dict.fromkeys(matched, QUANTISATIONS[variant]))
    return found


def check_patterns(patterns: Mapping[str, str], num_layers: int) -> None:
    """Refuse indices and ranges outside of a model.

    Raises:
        LayerPatternError: an index is outside of the model, or a range is empty.
    """
    for pattern in patterns:
        _span(pattern, num_layers)


def _span(pattern: str, num_layers: int) -> range | None:
    """Return the indices that a pattern names; None: it is a glob."""
    match = _INDEX.fullmatch(pattern.strip())
    if match is None:
        return None
    ends = []
    for text in (match[1], match[2] or match[1]):
        index = int(text)
        if not -num_layers <= index < num_layers:
            raise LayerPatternError(
                f"kv_cache.layers has the pattern {pattern!r}, but the model has layers 0 to "
                f"{num_layers - 1}; negative indices count from the last, which is -1."
            )
        ends.append(index % num_layers)
    if ends[0] > ends[1]:
        raise LayerPatternError(
            f"kv_cache.layers has the range {pattern!r}, which holds no layer: {ends[0]} comes "
            f"after {ends[1]}. Write the smaller index first."
        )
    return range(ends[0], ends[1] + 1)
