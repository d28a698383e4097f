"""Configuration and roles."""

from datadist import LLMClusterInfo, LLMConfig, LlmConfig, LLMRole

__all__ = ["LLMClusterInfo", "LLMConfig", "LLMRole", "LlmConfig"]
