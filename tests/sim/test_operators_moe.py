"""Mixture of experts, and weights in int8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sim_parity import assert_close, launches


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


EXPERTS = torch.tensor([[2, 0], [3, 2], [0, 1], [2, 3], [1, 0]], dtype=torch.int32)


def test_gating() -> None:
    import torch_npu

    logits = _normal(5, 8, dtype=torch.float32)
    weights, experts, _ = torch_npu.npu_moe_gating_top_k_softmax(logits.npu(), k=3)
    expected = logits.softmax(-1).topk(3, -1)
    torch.testing.assert_close(weights.cpu(), expected.values)
    assert torch.equal(experts.cpu().long(), expected.indices)
    assert launches()["aclnnMoeGatingTopKSoftmax"]


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_gating_by_groups(groups: int, sigmoid: bool) -> None:
    """As the documentation computes it: with a bias, the two best make a group's score."""
    import torch_npu

    logits, bias = _normal(6, 16, dtype=torch.float32), _normal(16, dtype=torch.float32, seed=2)
    weights, experts, normed = torch_npu.npu_moe_gating_top_k(
        *(logits.npu(), 3),
        bias=bias.npu(),
        k_group=max(1, groups // 2),
        group_count=groups,
        group_select_mode=1,
        norm_type=int(sigmoid),
        out_flag=True,
        routed_scaling_factor=2.5,
    )
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    torch.testing.assert_close(normed.cpu(), scores)
    for row in range(6):
        wanted = scores[row] + bias
        parts = wanted.view(groups, -1)
        order = parts.sort(-1, descending=True).values[:, :2].sum(-1).argsort(descending=True)
        kept = set(order[: max(1, groups // 2)].tolist())
        allowed = [e for e in range(16) if e * groups // 16 in kept]
        best = sorted(allowed, key=lambda e: -float(wanted[e]))[:3]
        assert experts[row].cpu().tolist() == best
        values = scores[row, best]
        values = values / values.sum() if sigmoid else values
        torch.testing.assert_close(weights[row].cpu(), values * 2.5)
    assert launches()["aclnnMoeGatingTopK"]


def test_permuting_and_back() -> None:
    import torch_npu

    x, weights = _normal(5, 32), torch.rand(5, 2).bfloat16()
    permuted, places = torch_npu.npu_moe_token_permute(x.npu(), EXPERTS.npu())
    order = EXPERTS.reshape(-1).argsort(stable=True)
    assert torch.equal(permuted.cpu(), x[order // 2])
    back = torch_npu.npu_moe_token_unpermute(permuted, places, weights.npu())
    expected = (x.float()[:, None] * weights.float()[..., None]).sum(1).bfloat16()
    assert_close(back.cpu(), expected, None)
    assert launches()["aclnnMoeTokenPermute"]
    assert launches()["aclnnMoeTokenUnpermute"]


def test_initial_routing() -> None:
    import torch_npu

    x = _normal(5, 64)
    expanded, rows, tokens, _ = torch_npu.npu_moe_init_routing_v2(
        *(x.npu(), EXPERTS.npu()),
        active_num=10,
        expert_num=4,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, 4],
        quant_mode=-1,
        row_idx_type=0,
    )
    order = EXPERTS.reshape(-1).argsort(stable=True)
    assert torch.equal(expanded.cpu(), x[order // 2])
    assert torch.equal(rows.cpu().long()[order], torch.arange(10))
    assert tokens.cpu().tolist() == [3, 2, 3, 2]


def test_tokens_of_experts() -> None:
    import torch_npu

    experts = EXPERTS.reshape(-1).sort().values
    sums = torch_npu.npu_moe_compute_expert_tokens(experts.npu(), 4)
    assert sums.cpu().tolist() == [3, 5, 8, 10]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counted", [False, True])
def test_products_per_expert(dtype: torch.dtype, counted: bool) -> None:
    import torch_npu

    x, weights = _normal(9, 32, dtype=dtype), _normal(4, 32, 48, dtype=dtype, seed=2)
    counts = torch.tensor([3, 0, 4, 2])
    (result,) = torch_npu.npu_grouped_matmul(
        *([x.npu()], [weights.npu()]),
        group_list=(counts if counted else counts.cumsum(0)).npu(),
        split_item=3,
        group_type=0,
        group_list_type=int(counted),
    )
    parts = x.split(counts.tolist())
    expected = torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])
    assert_close(result.cpu(), expected, None)


def test_int8_products_per_expert() -> None:
    import torch_npu

    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-127, 128, (9, 32), generator=generator).to(torch.int8)
    weights = torch.randint(-127, 128, (4, 32, 48), generator=generator).to(torch.int8)
    scales = torch.rand(4, 48, generator=generator).bfloat16() * 1e-3
    tokens = torch.rand(9, generator=generator)
    counts = torch.tensor([3, 0, 4, 2])
    (result,) = torch_npu.npu_grouped_matmul(
        *([x.npu()], [weights.npu()]),
        scale=[scales.npu()],
        per_token_scale=[tokens.npu()],
        group_list=counts.cumsum(0).npu(),
        split_item=3,
        group_type=0,
        output_dtype=torch.bfloat16,
    )
    expected, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        part = x[start : start + count].long() @ weights[expert].long()
        expected.append(part * scales[expert].float() * tokens[start : start + count, None])
        start += count
    assert_close(result.cpu(), torch.cat(expected).bfloat16(), None)


@pytest.mark.parametrize("group_size", [0, 32])
def test_products_with_int8_weights(group_size: int) -> None:
    import torch_npu

    x = _normal(5, 64)
    weight = torch.randint(-127, 128, (64, 96), generator=torch.Generator().manual_seed(6))
    weight = weight.to(torch.int8)
    shape = (2, 96) if group_size else (96,)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(7)).bfloat16() * 1e-2
    options: dict[str, Any] = {"antiquant_group_size": group_size} if group_size else {}
    result = torch_npu.npu_weight_quant_batchmatmul(x.npu(), weight.npu(), scale.npu(), **options)
    rows = scale.float().repeat_interleave(32, 0) if group_size else scale.float()
    expected = (x.double() @ (weight.float() * rows).bfloat16().double()).bfloat16()
    assert_close(result.cpu(), expected, None)
    assert launches()["aclnnWeightQuantBatchMatmulV2"]


def _refused(match: str, function: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(RuntimeError, match=match) as error:
        function(*args, **kwargs)
    assert "[source: " in str(error.value)


def test_what_is_documented_is_checked() -> None:
    import torch_npu

    logits, x = _normal(5, 2).npu(), _normal(5, 64).npu()
    gate = torch_npu.npu_moe_gating_top_k_softmax
    _refused("k 1025 outside 1 to 1024", gate, _normal(2, 2048).npu(), k=1025)
    route = torch_npu.npu_moe_init_routing_v2
    options = {"expert_num": 4, "active_expert_range": [0, 4], "quant_mode": -1}
    known = options | {"expert_tokens_num_type": 1}
    experts = EXPERTS.npu()
    _refused("expert_tokens_num_flag False", route, x, experts, **known)
    options["expert_tokens_num_flag"] = True
    _refused("expert_tokens_num_type 0", route, x, experts, **options)
    _refused("expert_idx is torch.int64", route, x, experts.long(), **options)
    back = torch_npu.npu_moe_token_unpermute
    places = torch.arange(5, device="npu", dtype=torch.int32)
    _refused("probs .* for 5 sorted_indices", back, x, places, logits)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("group_count 8 must cut 16 experts", {"group_count": 8, "k_group": 4}),
        ("group_count 3 must cut 16 experts", {"group_count": 3}),
        ("k_group 5 outside 1 to 4", {"group_count": 4, "k_group": 5}),
        ("k 3 outside 1 to 2|k 5 outside 1 to 4", {"group_count": 4, "k": 5}),
        ("group_select_mode 2", {"group_select_mode": 2}),
        ("renorm 1", {"renorm": 1}),
        ("norm_type 2", {"norm_type": 2}),
    ],
)
def test_gating_by_groups_that_is_refused(text: str, options: dict[str, Any]) -> None:
    import torch_npu

    moved = {n: v.npu() if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    gate = torch_npu.npu_moe_gating_top_k
    _refused(text, gate, _normal(2, 16, dtype=torch.float32).npu(), **({"k": 3} | moved))


def test_products_per_expert_that_are_refused() -> None:
    import torch_npu

    def run(weight: torch.Tensor, groups: list[int], dtype: torch.dtype = torch.int64) -> None:
        torch_npu.npu_grouped_matmul(
            *([_normal(9, 32).npu()], [weight.npu()]),
            group_list=torch.tensor(groups, dtype=dtype).npu(),
            split_item=3,
            group_type=0,
            group_list_type=1,
        )

    _refused("must not be of one", run, _normal(1, 32, 48), [9])
    _refused("inner dimension must be below", run, _normal(2, 32, 1 << 16), [4, 5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int8_products_per_expert_in_nz_order(dtype: torch.dtype) -> None:
    """There alone a bfloat16 result takes float32 scales."""
    import torch_npu

    generator = torch.Generator().manual_seed(8)
    x = torch.randint(-127, 128, (9, 32), generator=generator).to(torch.int8)
    weights = torch.randint(-127, 128, (4, 32, 64), generator=generator).to(torch.int8)
    scales = torch.rand(4, 64, generator=generator) * 1e-4
    tokens = torch.rand(9, generator=generator)
    counts = torch.tensor([3, 0, 4, 2])
    torch.npu.config.allow_internal_format = True
    tiled = torch_npu.npu_format_cast(weights.npu(), 29)
    (result,) = torch_npu.npu_grouped_matmul(
        *([x.npu()], [tiled]),
        scale=[scales.npu()],
        per_token_scale=[tokens.npu()],
        group_list=counts.npu(),
        split_item=2,
        group_type=0,
        group_list_type=1,
        output_dtype=dtype,
    )
    owner = torch.repeat_interleave(torch.arange(4), counts)
    exact = torch.einsum("rk,rkn->rn", x.double(), weights[owner].double()).float()
    assert_close(result.cpu(), (exact * scales[owner] * tokens[:, None]).to(dtype), None)
    assert launches()["aclnnGroupedMatmulWeightNz"]


@pytest.mark.parametrize(("bits", "grouped"), [(8, False), (4, False), (4, True)])
def test_weight_only_products_per_expert(bits: int, grouped: bool) -> None:
    import torch_npu

    generator = torch.Generator().manual_seed(9)
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (4, 64, 48), generator=generator, dtype=torch.int32)
    packed = codes.to(torch.int8).npu()
    if bits == 4:
        packed = torch_npu.npu_convert_weight_to_int4pack(codes.flatten(0, 1).npu())
        packed = packed.view(4, 64, 6)
    shape = (4, 2, 48) if grouped else (4, 48)
    scales = (torch.rand(shape, generator=generator) * 0.1).bfloat16()
    offsets = torch.randint(-8, 8, shape, generator=generator).bfloat16()
    if grouped:
        offsets.zero_()
    x, counts = _normal(9, 64), torch.tensor([3, 0, 4, 2])
    (result,) = torch_npu.npu_grouped_matmul(
        *([x.npu()], [packed]),
        antiquant_scale=[scales.npu()],
        antiquant_offset=[offsets.npu()],
        group_list=counts.npu(),
        split_item=2,
        group_type=0,
        group_list_type=1,
    )
    spread = [
        each.float().repeat_interleave(32, 1) if grouped else each.float()[:, None]
        for each in (offsets, scales)
    ]
    weights = ((codes + spread[0]) * spread[1]).bfloat16()  # as the cube unit wants them
    owner = torch.repeat_interleave(torch.arange(4), counts)
    expected = torch.einsum("rk,rkn->rn", x.double(), weights[owner].double())
    torch.testing.assert_close(result.cpu().double(), expected, atol=5e-2, rtol=1e-2)


def test_quantised_products_per_expert_that_are_refused() -> None:
    import torch_npu

    def run(x: torch.Tensor, weight: torch.Tensor, **scales: torch.Tensor) -> None:
        torch_npu.npu_grouped_matmul(
            *([x.npu()], [weight.npu()]),
            **{name: [each.npu()] for name, each in scales.items()},
            group_list=torch.tensor([4, 5]).npu(),
            split_item=2,
            group_type=0,
            group_list_type=1,
            output_dtype=torch.bfloat16,
        )
        torch.npu.synchronize()

    codes = torch.ones(2, 64, 32, dtype=torch.int8)
    x, scale = _normal(9, 64), torch.ones(2, 32)
    whole, like_x = x.to(torch.int8), scale.bfloat16()
    _refused("scale is torch.float32; allowed: torch.bfloat16", run, whole, codes, scale=scale)
    pair = {"antiquant_scale": like_x, "antiquant_offset": like_x}
    _refused("both needed", run, x, codes, antiquant_scale=like_x)
    groups = {name: each[:, None].expand(2, 2, 32).contiguous() for name, each in pair.items()}
    _refused("groups are for 4-bit weights", run, x, codes, **groups)


def test_zero_points_of_groups_are_refused_at_the_launch(child: Any) -> None:
    """What they are is known no earlier; a column's may be what they like."""
    finished = child(
        """
        import torch, torch_npu
        x = torch.ones(9, 64, dtype=torch.bfloat16).npu()
        words = torch.zeros(2, 64, 4, dtype=torch.int32).npu()
        ones = torch.ones(2, 2, 32, dtype=torch.bfloat16).npu()

        def run(offset):
            torch_npu.npu_grouped_matmul(
                [x], [words], antiquant_scale=[ones], antiquant_offset=[offset], split_item=2,
                group_type=0, group_list_type=1, group_list=torch.tensor([4, 5]).npu(),
            )
            torch.npu.synchronize()

        run(ones * 0)
        print("zeros pass")
        run(ones)
        """
    )
    assert "zeros pass" in finished.output
    assert finished.code != 0
    assert "zero points of groups; only those of columns are listed" in finished.output
