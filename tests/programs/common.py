"""What the programs share: arguments, tensors of NumPy or torch, and a barrier of files."""

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path

import numpy as np

from llm_datadist import LLMConfig

TIMEOUT = 120


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cluster_id", type=int, required=True)
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--tensors", choices=["numpy", "torch"], default="numpy")
    parser.add_argument("--ports", type=int, nargs="+", default=[])
    parser.add_argument("--meet", type=Path, required=True)
    return parser.parse_args()


def barrier(args: argparse.Namespace, name: str) -> None:
    """Wait for the other processes, as these programs do with torch.distributed."""
    (args.meet / f"{name}-{args.cluster_id}").touch()
    deadline = time.monotonic() + TIMEOUT
    while len(list(args.meet.glob(f"{name}-*"))) < args.members:
        if time.monotonic() > deadline:
            sys.exit(f"nobody came to {name}")
        time.sleep(0.01)


def rank_table() -> str:
    """One server with two devices, in the form of version 1.2."""
    devices = [
        {"device_id": str(r), "device_ip": f"192.168.1.{r + 1}", "rank_id": str(r)} for r in (0, 1)
    ]
    server = {"server_id": "1", "host_ip": "127.0.0.1", "device": devices}
    return json.dumps(
        {"version": "1.2", "status": "completed", "server_count": "1", "server_list": [server]}
    )


def base_config(**settings: object) -> LLMConfig:
    config = LLMConfig()
    config.device_id = 0
    config.sync_kv_timeout = 20_000
    for name, value in settings.items():
        setattr(config, name, value)
    return config


class Tensors:
    """``count`` float32 tensors of one shape, each full of its own number."""

    def __init__(self, kind: str, count: int, shape: tuple[int, ...], start: float) -> None:
        if kind == "torch":
            import torch

            self.all = [torch.full(shape, start + i, dtype=torch.float32) for i in range(count)]
            self.addresses = [tensor.data_ptr() for tensor in self.all]
        else:
            self.all = [np.full(shape, start + i, np.float32) for i in range(count)]
            self.addresses = [tensor.ctypes.data for tensor in self.all]

    def row(self, tensor: int, row: int) -> float:
        """The number that fills a row, which must be one number."""
        values = np.asarray(self.all[tensor][row])
        assert (values == values.flat[0]).all(), values
        return float(values.flat[0])


def peek(address: int, count: int) -> np.ndarray:
    """float32 numbers that lie at an address, as of a cache of the pool."""
    return np.frombuffer(ctypes.string_at(address, 4 * count), np.float32)


def poke(address: int, values: np.ndarray) -> None:
    """Write float32 numbers to an address."""
    data = values.astype(np.float32).tobytes()
    ctypes.memmove(address, data, len(data))
