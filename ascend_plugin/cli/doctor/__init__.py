"""``ascend-plugin doctor``: checks of this environment, each a small function returning rows."""
