"""Files of static KV scales: round trips, sharding, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascend_plugin.kv_cache.scales import (
    KVScalesError,
    LayerScales,
    check_layers,
    load_kv_scales,
    save_kv_scales,
)

META = {"format": "ascend-plugin-kv-scales", "version": "1"}


def _layer(seed: int = 0, heads: int = 4, dim: int = 16, **more: float | None) -> LayerScales:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.rand((2, heads, dim), generator=generator) + 0.01
    return LayerScales(key, value, **more)


def _file(path: Path, change: dict[str, torch.Tensor | None], meta: dict | None = None) -> Path:
    """Write a good file with some tensors replaced, added or left out."""
    save_kv_scales(path, {0: _layer(0), 1: _layer(1)}, {})
    tensors = {**load_file(path), **change}
    save_file(
        {k: v for k, v in tensors.items() if v is not None}, path, META if meta is None else meta
    )
    return path


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    layers = {3: _layer(3, k_error=0.01, v_error=0.0), 0: _layer(0), 11: _layer(11, k_error=0.5)}
    save_kv_scales(path, layers, {"model": "m", "format": "not ours to choose"})
    got, metadata = load_kv_scales(path)
    assert metadata == META | {"model": "m"}
    assert list(got) == [0, 3, 11]
    for index, layer in layers.items():
        assert torch.equal(got[index].k_scale, layer.k_scale)
        assert torch.equal(got[index].v_scale, layer.v_scale)
        assert got[index].k_error == pytest.approx(layer.k_error)
        assert got[index].v_error == layer.v_error


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    save_kv_scales(path, {0: _layer()}, {})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_kv_scales(path, {0: _layer(1)}, {"model": 7})  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(KVScalesError, match=r"cannot be written .*No such file.*directory"):
        save_kv_scales(tmp_path / "missing" / "x", {0: _layer()}, {})
    with pytest.raises(KVScalesError, match="no scales to write"):
        save_kv_scales(tmp_path / "x", {}, {})


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_heads(world: int) -> None:
    layer = _layer()
    parts = [layer.channel_scales(rank, world) for rank in range(world)]
    assert torch.equal(torch.cat(parts, 1), torch.stack((layer.k_scale, layer.v_scale)))
    assert all(part.is_contiguous() and part.dtype == torch.float32 for part in parts)


def test_few_heads_are_replicated() -> None:
    layer = _layer(heads=2)
    heads = [layer.channel_scales(rank, 8) for rank in range(8)]
    for rank, part in enumerate(heads):
        assert part.shape == (2, 1, 16)
        assert torch.equal(part[0, 0], layer.k_scale[rank // 4])


@pytest.mark.parametrize("world", [3, 6])
def test_heads_that_cannot_be_dealt(world: int) -> None:
    with pytest.raises(KVScalesError, match=f"4 kv heads, which cannot be dealt to {world}"):
        _layer().channel_scales(0, world)
    with pytest.raises(KVScalesError, match="rank 2 is outside"):
        _layer().channel_scales(2, 2)


def _with(value: float) -> torch.Tensor:
    scale = torch.ones(4, 16)
    scale[2, 5] = value
    return scale


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layers.1.k_scale": _with(float("nan"))},
            r"layers\.1\.k_scale is nan at kv head 2, channel 5",
        ),
        (
            {"layers.1.v_scale": _with(0.0)},
            r"layers\.1\.v_scale is 0\.0 at .* \(1 of 64 such values\)",
        ),
        ({"layers.0.v_scale": _with(-1.0)}, r"layers\.0\.v_scale is -1\.0 at"),
        ({"layers.0.k_scale": _with(float("inf"))}, r"layers\.0\.k_scale is inf at"),
        ({"layers.0.k_scale": _with(1e-39)}, "at least 1.18e-38"),
        ({"layers.0.k_scale": torch.ones(64)}, r"k_scale has shape \[64\]; it must be \[kv_heads"),
        ({"layers.0.k_scale": torch.ones(0, 16)}, r"k_scale has shape \[0, 16\]"),
        ({"layers.0.k_scale": torch.ones(4, 16).half()}, "k_scale has dtype torch.float16"),
        (
            {"layers.0.k_scale": torch.ones(2, 16)},
            r"layers\.0: k_scale is \[2, 16\] and v_scale \[4",
        ),
        ({"layers.1.v_scale": None}, r"lacks layers\.1\.v_scale"),
        ({"layers.1.offset": torch.ones(1)}, r"holds 'layers\.1\.offset'; allowed are"),
        ({"layers.01.k_scale": torch.ones(4, 16)}, r"holds 'layers\.01\.k_scale'"),
        ({"layers.0.k_error": torch.ones(2)}, r"layers\.0\.k_error must be one number"),
        ({"layers.0.k_error": torch.tensor([-1.0])}, r"layers\.0: k_error is -1\.0"),
        ({"layers.0.v_error": torch.tensor([float("nan")])}, r"layers\.0: v_error is nan"),
    ],
    ids=str,
)
def test_bad_tensors(tmp_path: Path, change: dict, message: str) -> None:
    path = _file(tmp_path / "scales.safetensors", change)
    with pytest.raises(KVScalesError, match=message) as caught:
        load_kv_scales(path)
    assert str(path) in str(caught.value)
    assert "ascend-plugin calibrate kv" in str(caught.value)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(KVScalesError, match=r"is not a file.*calibrate kv.*kv_cache\.scales"):
        load_kv_scales(tmp_path / "missing")
    (tmp_path / "text").write_text("scales")
    with pytest.raises(KVScalesError, match="is not a safetensors file"):
        load_kv_scales(tmp_path / "text")
    for meta in ({}, META | {"version": "2"}, META | {"format": "pt"}):
        path = _file(tmp_path / "other", {}, meta)
        with pytest.raises(KVScalesError, match="is not a file of KV scales: its metadata says"):
            load_kv_scales(path)
    save_file({}, tmp_path / "empty", META)
    with pytest.raises(KVScalesError, match="holds no scales"):
        load_kv_scales(tmp_path / "empty")


def test_scales_of_another_model() -> None:
    layers = {0: _layer(0), 1: _layer(1), 5: _layer(5)}
    check_layers(layers, [0, 5], 4, 16, "here")
    with pytest.raises(KVScalesError, match=r"here has no scales for layers 2-4, 7; it has 0-1, 5"):
        check_layers(layers, [0, 1, 2, 3, 4, 5, 7], 4, 16, "here")
    with pytest.raises(KVScalesError, match="no scales for layer 0; it has none"):
        check_layers({}, [0], 4, 16, "here")
    for heads, dim in ((2, 16), (4, 32)):
        with pytest.raises(
            KVScalesError,
            match=rf"layers\.0 has scales for 4 kv heads of 16 .* has {heads} kv heads",
        ):
            check_layers(layers, [0], heads, dim, "here")
