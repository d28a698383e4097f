"""Places vLLM's KV cache in a pool of datadist.

vLLM's CPU build allocates it with one ``torch.zeros`` of int8. Peers on the host map a pool: they need
no right to trace this process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class PoolAllocation(TorchFunctionMode):
    """A context in which a large ``torch.zeros`` of int8 is memory that ``allocate`` gives."""

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self._allocate = allocate
        self.used = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func is torch.zeros and len(args) == 1 and type(args[0]) is int and _is_cpu_bytes(given):
            if self.used:
                raise RuntimeError("vLLM allocated its KV cache in two pieces, which 0.32 does not")
            self.used = True
            return self._allocate(args[0])
        return func(*args, **given)


def _is_cpu_bytes(given: Mapping[str, Any]) -> bool:
    device = torch.device(given.get("device") or "cpu")
    return given.get("dtype") is torch.int8 and device.type == "cpu"
