"""Status codes and the exception that carries them."""

from datadist import LLMException, LLMStatusCode, Status

__all__ = ["LLMException", "LLMStatusCode", "Status"]
