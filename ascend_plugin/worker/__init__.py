"""Workers that vLLM starts on each device."""
