"""``bench linear``: quantised linear layers against bfloat16 and vLLM's own, call by call."""
