"""Tensors of torch in memory that peers can map.

with TorchMemory():
    kv = [torch.zeros(512, 16, 8, 128, dtype=torch.bfloat16) for _ in range(64)]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from datadist.api.shared_arrays import empty

__all__ = ["TorchMemory"]

LEAST = 1 << 20


class TorchMemory(TorchFunctionMode):  # type: ignore[misc,unused-ignore]
    """A context in which large tensors of the CPU are made of memory that peers can map.

    It applies to ``torch.empty``, ``zeros``, ``ones`` and ``full``, for tensors of ``least`` bytes or
    more: each is a file of memory of its own. It raises as :func:`datadist.empty` does.
    """

    def __init__(self, least: int = LEAST) -> None:
        super().__init__()
        self._least = least

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func not in (torch.empty, torch.zeros, torch.ones, torch.full) or not _is_plain(given):
            return func(*args, **given)
        wanted = func(*args, **{**given, "device": "meta"})
        if wanted.nbytes < self._least:
            return func(*args, **given)
        made = torch.from_numpy(empty(wanted.nbytes, "uint8")).view(wanted.dtype).view(wanted.shape)
        if func is torch.ones:
            made.fill_(1)
        elif func is torch.full:
            made.fill_(given["fill_value"] if "fill_value" in given else args[1])
        return made.requires_grad_(wanted.requires_grad)


def _is_plain(given: Mapping[str, Any]) -> bool:
    """Whether it is a dense tensor of the CPU in a memory format that says nothing."""
    device = torch.device(given.get("device") or torch.get_default_device())
    dense = given.get("layout") in (None, torch.strided)
    contiguous = given.get("memory_format") in (None, torch.contiguous_format)
    return (
        device.type == "cpu"
        and dense
        and contiguous
        and not (given.get("pin_memory") or given.get("out") is not None or given.get("names"))
    )
