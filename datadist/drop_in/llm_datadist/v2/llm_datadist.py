"""The engine."""

from datadist import LLMDataDist

__all__ = ["LLMDataDist"]
