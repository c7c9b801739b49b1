"""Patterns that name layers, and the variants that they get."""

from __future__ import annotations

import pytest

from ascend_plugin.kv_cache.variants import LayerPatternError, check_patterns, layer_variants

LAYERS = {f"model.layers.{i}.self_attn.attn": i for i in range(12)}


def _variants(patterns: dict[str, str], default: str = "c8d") -> list[str]:
    found = layer_variants(patterns, default, LAYERS, 12)
    assert list(found) == list(LAYERS)
    return [variant.name.lower() for variant in found.values()]


@pytest.mark.parametrize(
    ("patterns", "changed"),
    [
        ({}, []),
        ({"0": "auto"}, [0]),
        ({"1": "auto"}, [1]),
        ({"-1": "auto"}, [11]),
        ({"-12": "auto"}, [0]),
        ({"2-4": "auto"}, [2, 3, 4]),
        ({"10--1": "auto"}, [10, 11]),
        ({"-2--1": "auto"}, [10, 11]),
        ({"0": "auto", "5": "auto"}, [0, 5]),
        ({"*.layers.1.*": "auto"}, [1]),
        ({"*.layers.1?.*": "auto"}, [10, 11]),
        ({"*": "auto"}, list(range(12))),
        ({"0-11": "auto", "3-11": "c8d"}, [0, 1, 2]),
        ({"3-11": "c8d", "0-11": "auto"}, list(range(12))),
        (dict.fromkeys(LAYERS, "auto"), list(range(12))),
    ],
    ids=str,
)
def test_patterns(patterns: dict, changed: list[int]) -> None:
    assert _variants(patterns) == ["none" if i in changed else "c8d" for i in range(12)]


def test_every_variant() -> None:
    assert _variants({"0": "c8s", "1": "c8p", "2": "auto", "3": "c8d"}, "c8p")[:5] == [
        *("c8s", "c8p", "none", "c8d", "c8p")
    ]


def test_ranges_may_lie_in_other_processes() -> None:
    half = {name: index for name, index in LAYERS.items() if index < 6}
    found = layer_variants({"4-8": "auto", "-1": "auto"}, "c8d", half, 12)
    assert [variant.name for variant in found.values()] == ["C8D"] * 4 + ["NONE"] * 2
    with pytest.raises(LayerPatternError, match="matches no layer"):
        layer_variants({"*.layers.7.*": "auto"}, "c8d", half, 12)
    found = layer_variants({"*.layers.7.*": "auto"}, "c8d", half, 12, complete=False)
    assert {variant.name for variant in found.values()} == {"C8D"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("12", "'12', but the model has layers 0 to 11; negative indices count from the last"),
        ("-13", "'-13', but the model has layers 0 to 11"),
        ("4-12", "'4-12', but the model has layers 0 to 11"),
        ("4-2", "the range '4-2', which holds no layer: 4 comes after 2. Write the smaller"),
        ("layers.1", r"'layers\.1', which matches no layer; names are like 'model\.layers\.0"),
        ("1,2", "'1,2', which matches no layer"),
    ],
)
def test_refusals(pattern: str, message: str) -> None:
    with pytest.raises(LayerPatternError, match=message):
        _variants({pattern: "auto"})


def test_indices_can_be_checked_without_layers() -> None:
    check_patterns({"0": "auto", "*.anything": "c8d"}, 12)
    with pytest.raises(LayerPatternError, match="layers 0 to 11"):
        check_patterns({"0": "auto", "12": "c8d"}, 12)
