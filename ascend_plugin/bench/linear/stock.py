"""vLLM's own CPU linear layers, called as vLLM 0.32.0's kernels call them."""

from __future__ import annotations

import torch

from ascend_plugin.bench.linear.cases import LinearCase
from ascend_plugin.bench.linear.contenders import Call, keeping
from ascend_plugin.bench.linear.data import LinearData
from ascend_plugin.bench.stock_operators import load_stock_operators
from ascend_plugin.bench.timing import Prepared

#: Codes of 4 bits in a word of vLLM's packing.
_PACK_FACTOR = 8


class StockContender:
    """vLLM's CPU operators.

    Sources: ``vllm/model_executor/kernels/linear/mixed_precision/cpu.py`` (W4A16),
    ``…/scaled_mm/cpu.py`` (W8A8), ``model_executor/layers/utils.py`` (bfloat16).
    """

    name = "vllm"

    def __init__(self) -> None:
        """Load vLLM's operators; if that fails, every case is refused with the reason."""
        self._ops, self._missing = load_stock_operators("cpu_gemm_wna16")

    @property
    def missing(self) -> str | None:
        """Why vLLM's operators cannot be called; None: they can."""
        return self._missing

    def refusal(self, case: LinearCase) -> str | None:
        """Return why vLLM has no kernel for this case."""
        if self._missing:
            return self._missing
        if not case.quantised:
            return "vLLM's layer without quantisation is vllm_bf16"
        if case.scheme == "w8a16":
            return "vLLM has no W8A16 on a CPU"
        if case.scheme != "w8a8" and (case.n % 32 or case.k % 32):
            return "vLLM's W4A16 takes sizes that are multiples of 32"
        return None

    def prepare(self, data: LinearData) -> Prepared:
        """Prepare vLLM's layer of the same scheme."""
        call = self._int8(data) if data.case.scheme == "w8a8" else self._wna16(data)
        return keeping(call, data, implementation="vllm")

    def bf16(self, data: LinearData) -> Prepared:
        """Prepare vLLM's bfloat16 layer: oneDNN with weights re-ordered at load."""
        handlers = [
            self._ops.create_onednn_mm(data.dense.clone().t(), 32) for _ in range(data.case.layers)
        ]
        return keeping(
            lambda layer: self._ops.onednn_mm(handlers[layer], data.x, None),
            data,
            implementation="vllm",
        )

    def _int8(self, data: LinearData) -> Call:
        handlers = [
            self._ops.create_onednn_scaled_mm(
                data.codes.clone().t(), data.scales, data.x.dtype, True, False, 32
            )
            for _ in range(data.case.layers)
        ]
        x, n = data.x, data.case.n

        def call(layer: int) -> torch.Tensor:
            codes, scales, _ = self._ops.onednn_scaled_int8_quant(x, None, None, True)
            out = torch.empty(x.shape[0], n, dtype=x.dtype)
            return self._ops.onednn_scaled_mm(handlers[layer], codes, out, scales, None, None, None)

        return call

    def _wna16(self, data: LinearData) -> Call:
        from vllm.model_executor.layers.quantization.utils.quant_utils import (
            pack_quantized_values_into_int32,
        )
        from vllm.scalar_type import scalar_types

        kind = scalar_types.uint4 if data.case.zeros else scalar_types.uint4b8

        def packed(codes: torch.Tensor) -> torch.Tensor:
            unsigned = (codes.to(torch.int32) + 8).t().contiguous()  # [k, n]
            return pack_quantized_values_into_int32(unsigned, kind, 1)

        k = data.case.k
        words = packed(data.codes)  # [k, n / 8]; then 16 columns side by side
        words = words.view(k, -1, 16 // _PACK_FACTOR).permute(1, 0, 2).reshape(-1, k * 2)
        layers = range(data.case.layers)
        weights = [words.contiguous().clone() for _ in layers]
        scales = data.scales.t().contiguous()
        zeros = None if data.zeros is None else packed(data.zeros).contiguous()
        x = data.x

        def call(layer: int) -> torch.Tensor:
            return self._ops.cpu_gemm_wna16(
                x, weights[layer], scales, zeros, None, _PACK_FACTOR, "vec"
            )

        return call
