"""Scripts that run in a tool's own environment; they are started by path and never imported."""
