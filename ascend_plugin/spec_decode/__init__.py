"""Speculation: draft layers that fit, and what makes drafts pay."""
