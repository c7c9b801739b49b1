"""What the NPU's fused attention takes of latent attention (MLA); asked where no NPU is needed too.

Sources: the documentation of ``torch_npu.npu_fused_infer_attention_score_v2``, section on MLA, and
the tiling checks of the operator's public sources (``CheckFeatureMlaNoQuantShape``).
"""

from __future__ import annotations

#: The only sizes for which the operator reads latents and rotary parts from NZ pages.
LATENT_DIM, ROTARY_DIM = 512, 64

#: Query heads on one device: a power of two up to this.
MAX_HEADS = 128


def why_not(latent_dim: int, rotary_dim: int, num_heads: int) -> list[str]:
    """Return why a model's latent attention is not served on an NPU; empty: it is.

    Args:
        latent_dim: ``kv_lora_rank``.
        rotary_dim: ``qk_rope_head_dim``.
        num_heads: query heads on one device.
    """
    dims, power = (latent_dim, rotary_dim), num_heads > 0 and num_heads & (num_heads - 1) == 0
    reasons = [
        (
            dims != (LATENT_DIM, ROTARY_DIM),
            f"kv_lora_rank {latent_dim} with qk_rope_head_dim {rotary_dim}; the fused attention "
            f"reads {LATENT_DIM} with {ROTARY_DIM}",
        ),
        (
            not power or num_heads > MAX_HEADS,
            f"{num_heads} query heads on a device; the fused attention takes powers of two up to "
            f"{MAX_HEADS}: change --tensor-parallel-size",
        ),
    ]
    return [reason for wrong, reason in reasons if wrong]
