"""``bench mla``: decode of latent attention against vLLM's own CPU operator."""
