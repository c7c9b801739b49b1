"""Multi-token prediction: a trained draft layer for dense models, and what it is worth.

A base model stays as it is; a layer in MiMo's layout learns to predict the token after the next one
from the base's last hidden state and the next token. vLLM's ``{"method": "mtp"}`` then drafts with
it. ``docs/speculation.md`` says what it costs and gains.
"""
