"""The cache manager."""

from datadist.api.cache_manager import CacheManager

__all__ = ["CacheManager"]
