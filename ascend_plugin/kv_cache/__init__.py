"""The paged KV cache: formats of pages and their bytes."""

from .latent import LatentPageFormat
from .page import PageFormat, Plane, Region

__all__ = ["LatentPageFormat", "PageFormat", "Plane", "Region"]
