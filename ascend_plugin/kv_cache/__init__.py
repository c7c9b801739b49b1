"""The paged KV cache: formats of pages and their bytes."""

from .page import PageFormat, Plane, Region

__all__ = ["PageFormat", "Plane", "Region"]
