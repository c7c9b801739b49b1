"""``bench attention``: the plugin's operators against vLLM's CPU operators, call by call."""
