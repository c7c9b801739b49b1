"""Mixture of experts on an NPU: the CPU platform's tokens, in every graph mode."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import Answer, EngineProcess
from npu_engines import CAPTURED, NPUModels, assert_identical, assert_near, on_the_cpu, settings
from prompts import tokens

LAYERS = 2
SHAPE: dict[str, Any] = {"architecture": "qwen3_moe", "intermediate": 64, "layers": LAYERS}
RUN = {"prompts": [tokens(count, seed=count) for count in (7, 39, 150)], "max_tokens": 8}


@pytest.fixture(scope="module")
def model(models: NPUModels) -> str:
    return models("qwen3_moe", **SHAPE)


@pytest.fixture(scope="module")
def eager(npu: EngineProcess, model: str) -> Answer:
    return npu.run(settings(model), RUN)


@pytest.mark.engine
def test_tokens_are_those_of_the_cpu(cpu: EngineProcess, model: str, eager: Answer) -> None:
    wanted = cpu.run(on_the_cpu(settings(model)), RUN)
    assert eager.made_of["platform"] == "AscendNPUPlatform"
    assert assert_near(wanted.outputs(), eager.outputs()) > 0


@pytest.mark.engine
def test_graphs_give_the_tokens_of_the_eager_engine(
    npu: EngineProcess, model: str, eager: Answer
) -> None:
    """Tokens of another step go to other experts: nothing of that is frozen."""
    answer = npu.run(settings(model, "full and piecewise"), RUN)
    assert_identical(eager.outputs(), answer.outputs())
    assert answer.made_of["graphs"]["captures"] == len(CAPTURED) * (LAYERS + 2)
    assert answer.made_of["graphs"]["replays"] > 0


def test_what_is_refused_is_said() -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from ascend_plugin.worker.npu_moe import why_not

    one: dict[str, Any] = {"use_ep": False, "enable_eplb": False, "is_sequence_parallel": False}
    one |= {"dp_size": 1, "pcp_size": 1}

    plain = {"has_bias": False, "is_lora_enabled": False, "activation": MoEActivation.SILU}

    def reasons(spread: bool = True, **changes: Any) -> str:
        layer = {name: changes.pop(name, value) for name, value in plain.items()}
        parallel = SimpleNamespace(**one | changes)
        return ", ".join(why_not(SimpleNamespace(moe_parallel_config=parallel, **layer), spread))

    assert reasons() == reasons(use_ep=True) == reasons(dp_size=2) == ""
    assert "leave --enable-expert-parallel out" in reasons(spread=False, use_ep=True)
    assert "leave --enable-eplb out" in reasons(enable_eplb=True)
    assert "set --data-parallel-size 1" in reasons(use_ep=True, dp_size=2)
    assert "--prefill-context-parallel-size 1" in reasons(use_ep=True, pcp_size=2)
    assert "sequence parallelism" in reasons(use_ep=True, is_sequence_parallel=True)
    assert "bias" in reasons(has_bias=True)
    assert "LoRA" in reasons(is_lora_enabled=True)
    assert "'gelu', not SwiGLU" in reasons(activation=MoEActivation.GELU)


TOKENS, HIDDEN, INNER, EXPERTS = 9, 64, 32, 6


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_choice_of_experts(kind: str, renormalise: bool, device: torch.device) -> None:
    from ascend_plugin.ops.npu import experts

    torch.manual_seed(0)
    logits = torch.randn(TOKENS, EXPERTS).to(torch.bfloat16)
    choose = experts.choose_softmax if kind == "softmax" else experts.choose_sigmoid
    weights, ids = choose(logits.to(device), 3, renormalise)
    scores = logits.float().softmax(-1) if kind == "softmax" else logits.float().sigmoid()
    want, want_ids = scores.topk(3, -1)
    if renormalise:
        want = want / want.sum(-1, keepdim=True)
    assert ids.dtype == torch.int32
    torch.testing.assert_close(scores.gather(1, ids.cpu().long()), scores.gather(1, want_ids))
    torch.testing.assert_close(weights.cpu(), want)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (8, 3)], ids=str)
def test_choice_of_experts_by_groups(
    groups: tuple[int, int], sigmoid: bool, renormalise: bool, biased: bool, device: torch.device
) -> None:
    """As vLLM's own code; groups of two experts are more than the operator cuts."""
    from ascend_plugin.ops.npu import experts

    torch.manual_seed(2)
    logits = torch.randn(TOKENS, 16)
    bias = torch.randn(16) * 0.3 if biased else None
    how = experts.Grouping(3, *groups, sigmoid, renormalise, 1.5)
    on_device = [None if each is None else each.to(device) for each in (logits, bias)]
    weights, ids = experts.choose_grouped(*on_device, how)
    want, want_ids = _as_vllm(logits, bias, how)
    assert ids.dtype == torch.int32
    order, want_order = ids.cpu().argsort(-1), want_ids.argsort(-1)
    assert torch.equal(ids.cpu().gather(1, order), want_ids.gather(1, want_order))
    torch.testing.assert_close(weights.cpu().gather(1, order), want.gather(1, want_order))


def _as_vllm(
    logits: torch.Tensor, bias: torch.Tensor | None, how: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    import vllm.model_executor.layers.fused_moe.router.grouped_topk_router as router

    plain = getattr(router.grouped_topk, "_torchdynamo_orig_callable", router.grouped_topk)
    kind = "sigmoid" if how.sigmoid else "softmax"
    sizes = (how.top_k, how.renormalise, how.groups, how.kept)
    return plain(logits, logits, *sizes, kind, how.scale, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens_", [1, TOKENS])
def test_products_of_experts(tokens_: int, dtype: torch.dtype, device: torch.device) -> None:
    """Some experts get no row; a token's experts are in no order."""
    from ascend_plugin.ops.npu import experts

    torch.manual_seed(1)
    x = torch.randn(tokens_, HIDDEN).to(dtype)
    gate_up = (torch.randn(EXPERTS, HIDDEN, 2 * INNER) * HIDDEN**-0.5).to(dtype)
    down = (torch.randn(EXPERTS, INNER, HIDDEN) * INNER**-0.5).to(dtype)
    ids = torch.stack([torch.randperm(EXPERTS - 1)[:2] for _ in range(tokens_)]).int()
    weights = torch.rand(tokens_, 2)
    on_device = [each.to(device) for each in (x, gate_up, down, weights, ids)]
    got = experts.swiglu_experts(*on_device).cpu()
    want = torch.zeros(tokens_, HIDDEN)
    for token in range(tokens_):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = (x[token].float() @ gate_up[expert].float()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            want[token] += weight * (inner @ down[expert].float())
    torch.testing.assert_close(got.float(), want, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("tokens_", [1, TOKENS])
def test_experts_of_two_devices(tokens_: int, device: torch.device) -> None:
    """Both parts together are the whole; rows of the other device's experts add nothing."""
    from ascend_plugin.ops.npu import experts
    from ascend_plugin.worker.npu_moe import order_of

    torch.manual_seed(2)
    dtype = torch.bfloat16
    x = torch.randn(tokens_, HIDDEN, dtype=dtype)
    gate_up = (torch.randn(EXPERTS, HIDDEN, 2 * INNER) * HIDDEN**-0.5).to(dtype)
    down = (torch.randn(EXPERTS, INNER, HIDDEN) * INNER**-0.5).to(dtype)
    ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens_)]).int()
    weights = torch.rand(tokens_, 2)
    on_device = [each.to(device) for each in (x, gate_up, down, weights, ids)]
    want = experts.swiglu_experts(*on_device).cpu().float()
    total = torch.zeros_like(want)
    # Interleaved, as vLLM places experts if it is asked to.
    for mine in (torch.arange(EXPERTS) % 2 == 0, torch.arange(EXPERTS) % 2 == 1):
        place = torch.full((EXPERTS,), -1, dtype=torch.int32)
        place[mine] = torch.arange(int(mine.sum()), dtype=torch.int32)
        local = [x, gate_up[mine], down[mine], weights, ids, order_of(place)]
        poison = torch.full((64, 1024, 1024), torch.nan, dtype=dtype, device=device)
        del poison  # what products do not write is no number
        part = experts.swiglu_local_experts(*(each.to(device) for each in local)).cpu().float()
        elsewhere = ~mine[ids.long()].any(-1)
        assert not part[elsewhere].any()
        total += part
    torch.testing.assert_close(total, want, atol=2e-2, rtol=2e-2)
