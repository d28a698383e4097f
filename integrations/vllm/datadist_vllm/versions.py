"""Which versions of vLLM this connector was written for."""

from __future__ import annotations

SUPPORTED = "0.32"


def check_vllm_version(version: str) -> None:
    """Raise ``RuntimeError`` outside of the supported range: the connector interface may differ there."""
    if version.split("+", maxsplit=1)[0].split(".")[:2] == SUPPORTED.split("."):
        return
    raise RuntimeError(
        f"vLLM {version} is installed, and this datadist-vllm was written for vLLM {SUPPORTED}.x: "
        "vLLM calls its connector interface experimental. Install that version, or a newer datadist-vllm"
    )
