"""Who is measured: the plugin's operators and torch's bfloat16 layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ascend_plugin.bench.linear.data import LinearData
from ascend_plugin.bench.recorded import is_recorded, recorded
from ascend_plugin.bench.timing import Prepared
from ascend_plugin.ops import dense_matmul as dense_op
from ascend_plugin.ops import dynamic_quant as quant_op
from ascend_plugin.ops import quant_matmul as int8_op
from ascend_plugin.ops import weight_quant_matmul as weight_op
from ascend_plugin.ops.native import loader, memory
from ascend_plugin.ops.packed_weight import PackedWeight

#: A call on the weights of one layer.
Call = Callable[[int], torch.Tensor]


def keeping(call: Call, data: LinearData, **described: str | None) -> Prepared:
    """Return a contender whose last result is kept, as a model would use it."""
    result = torch.empty(data.case.m, data.case.n, dtype=data.x.dtype)
    kept = [result]

    def run(layer: int) -> None:
        kept[0] = call(layer)

    def last() -> torch.Tensor:
        return kept[0]

    return Prepared(
        run=run,
        layers=data.case.layers,
        result=result,
        implementation=described.get("implementation") or "",
        isa=described.get("isa"),
        last=last,
    )


def plugin(data: LinearData) -> Prepared:
    """Prepare the plugin's operators as its engine calls them, weights as its worker has them."""
    case = data.case
    prepare = _dense
    if case.quantised:
        prepare = _int8 if case.scheme == "w8a8" else _weight_only
    call, weights, chosen = prepare(data)
    memory.collapse_into_huge_pages(part for each in weights for part in memory.tensors_in(each))
    if is_recorded(case.m):
        call = recorded(call, case.layers)
    isa = loader.load().isa if chosen == "native" else None
    return keeping(call, data, implementation=chosen, isa=isa)


def _dense(data: LinearData) -> tuple[Call, Sequence[object], str]:
    case, x = data.case, data.x
    weights = [data.dense.clone() for _ in range(case.layers)]
    request = dense_op.DenseRequest(x.dtype, case.n, case.k)
    chosen = dense_op.operator.choose(request).implementation.name
    return lambda layer: dense_op.dense_matmul(x, weights[layer]), weights, chosen


def _weight_only(data: LinearData) -> tuple[Call, Sequence[object], str]:
    case, x = data.case, data.x
    first = weight_op.pack(data.codes, data.scales, data.zeros, bits=case.bits, group=case.group)
    weights = [
        PackedWeight(
            first.weight.clone(),
            first.scales.clone(),
            None if first.zeros is None else first.zeros.clone(),
            *(first.n, first.k, first.group, first.bits),
        )
        for _ in range(case.layers)
    ]
    request = weight_op.LinearRequest(
        x.dtype, first.scales.dtype, case.n, case.k, case.group, case.bits, case.zeros
    )
    chosen = weight_op.operator.choose(request).implementation.name
    return lambda layer: weight_op.weight_quant_matmul(x, weights[layer]), weights, chosen


def _int8(data: LinearData) -> tuple[Call, Sequence[object], str]:
    case, x = data.case, data.x
    first = int8_op.pack_int8(data.codes)
    weights = [
        int8_op.Int8Weight(first.weight.clone(), first.column_sums.clone(), first.n, first.k)
        for _ in range(case.layers)
    ]
    scales = data.scales.flatten()

    def call(layer: int) -> torch.Tensor:
        rows = quant_op.dynamic_quant(x)
        return int8_op.quant_matmul(
            rows.codes, weights[layer], scales, rows.scales, out_dtype=x.dtype
        )

    request = int8_op.Int8Request(x.dtype, case.n, case.k)
    return call, weights, int8_op.operator.choose(request).implementation.name


def bf16(data: LinearData) -> Prepared:
    """Prepare ``torch.nn.functional.linear``, which is oneDNN on a CPU."""
    weights = [data.dense.clone() for _ in range(data.case.layers)]
    x, linear = data.x, torch.nn.functional.linear
    return keeping(lambda layer: linear(x, weights[layer]), data, implementation="torch")
