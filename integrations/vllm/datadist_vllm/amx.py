"""The permission of Linux to use AMX, which a process has to ask for once."""

from __future__ import annotations

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

logger = init_logger(f"vllm.{__name__}")


def permit_amx() -> None:
    """Ask for it where vLLM's kernels for CPUs use AMX (bfloat16).

    vLLM 0.32 does not ask: oneDNN does in the first larger matrix product, so an instance that prefills
    has it. One whose first forward pass has one token, as a decoder's, dies with SIGILL without it.
    """
    if current_platform.device_type != "cpu" or not torch.cpu._is_amx_tile_supported():
        return
    if not torch.cpu._init_amx():
        logger.warning(
            "Linux does not let this process use AMX, which vLLM's kernels for bfloat16 need: "
            "use --dtype float32"
        )
