"""Attention backends over NZ pages."""
