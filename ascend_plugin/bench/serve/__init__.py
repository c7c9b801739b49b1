"""``bench serve``: whole engines, vLLM's CPU platform against the plugin's."""
