"""Source and target blocks of one transfer, below 64, in every form that is taken."""

from __future__ import annotations

from typing import Any

import numpy as np

LISTS: list[Any] = [
    ([5], [6]),
    ([1, 2, 3, 9], [30, 31, 32, 4]),
    ((7, 8), (8, 7)),
    (list(range(40)), list(range(20, 60))),
    (np.arange(10), np.arange(10, 20)),
    (np.array([3], np.int32), np.array([60], np.uint8)),
    ([np.int64(3)], [np.uint8(60)]),
    (list(np.arange(12)), list(np.arange(20, 32))),
]
