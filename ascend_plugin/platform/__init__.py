"""The platforms that vLLM sees: an NPU, or the CPU fallback."""
