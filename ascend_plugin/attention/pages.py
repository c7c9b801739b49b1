"""What the backends of all devices tell vLLM about NZ pages."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVQuantMode

from ascend_plugin.config import INT8_DTYPE
from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops import checks
from ascend_plugin.ops.page_layout import Arrangement, Quantisation

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec


class NZPageBackend(AttentionBackend):
    """Paged attention over NZ pages: the device adds types, head dimensions and its classes."""

    #: What int8 pages hold; layers of other variants get a subclass (``kv_quantisation.py``).
    quantisation: ClassVar[Quantisation] = Quantisation.C8D
    #: How the device wants K and V inside a page.
    arrangement: ClassVar[Arrangement] = Arrangement.RUN_MAJOR

    forward_includes_kv_cache_update = False
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16", INT8_DTYPE]

    @staticmethod
    def get_name() -> str:
        """Return the member of ``AttentionBackendEnum`` that the platform registers."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Return the block sizes that pages can hold: whole fractals of 16 tokens."""
        return [MultipleOf(checks.BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Return whether pages can hold the block size; None: not chosen yet."""
        return block_size is None or (
            0 < block_size <= checks.MAX_BLOCK_SIZE and block_size % checks.BLOCK_SIZE_MULTIPLE == 0
        )

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Check that pages can hold the layer, and say how many bytes an int8 page takes.

        Without quantisation vLLM's sizes are ours.
        """
        checks.check_head_dim(spec.head_size, spec.head_size_v)
        # vLLM asks twice where it chooses the block size itself (sliding windows).
        if spec.kv_quant_mode == KVQuantMode.NONE or spec.state_content_bytes is not None:
            return spec
        # ... and first with blocks of one token, only to compare sizes; no page is so small.
        block_size = max(spec.block_size, checks.BLOCK_SIZE_MULTIPLE)
        page = PageFormat(
            spec.dtype,
            block_size,
            spec.num_kv_heads,
            spec.head_size,
            cls.quantisation,
            arrangement=cls.arrangement,
        )
        return replace(spec, state_content_bytes=page.token_bytes)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Sliding windows are served."""
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Attention to later tokens of the cache is served."""
        return True
