"""No operator of the table goes untested: the last of the operator tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from sim_parity import launches

#: torch_npu chooses one of these by the version of CANN.
ALTERNATIVES = {"aclnnFusedInferAttentionScoreV2", "aclnnFusedInferAttentionScoreV3"}


def test_every_operator_ran(request: pytest.FixtureRequest) -> None:
    from ascend_plugin.ops.sim.bind import TABLE
    from ascend_plugin.ops.sim.table import OPERATORS

    files = {path.name for path in Path(__file__).parent.glob("test_operators_*.py")}
    collected = {item.path.name for item in request.session.items}
    chosen = request.config.option.keyword or request.config.option.markexpr
    if not files <= collected or chosen or request.session.testsfailed:
        pytest.skip("the operators are counted when all their tests ran")
    queries = {name for name in OPERATORS if name.endswith("GetMaxWorkspaceSize")}
    expected = OPERATORS.keys() - set(TABLE.absent) - queries
    missing = expected - launches().keys()
    assert missing < ALTERNATIVES or not missing, sorted(missing)
    # What torch_npu does not name cannot run: a typing error in the table.
    assert set(TABLE.absent) <= {"aclnnFusedInferAttentionScoreV2GetMaxWorkspaceSize"}


def test_calls_are_forgotten_when_nothing_holds_them() -> None:
    import torch

    from ascend_plugin.ops.sim.bind import TABLE

    x = torch.ones(4, device="npu")
    for _ in range(100):
        x.add_(1)
    torch.npu.synchronize()
    torch.npu.synchronize()
    assert len(TABLE) < 50
