"""Copy with each kernel that this processor has. Run where the wheel under trial is installed."""

import platform

import numpy as np
from datadist_shm import _native

SIZE = 8 << 20


def _vector(number: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([number], dtype=np.int64)


def main() -> None:
    """Raise AssertionError where a byte is wrong."""
    given = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
    for kernel in _native.KERNELS.values():
        got = np.zeros_like(given)
        _native.copy(_vector(got.ctypes.data), _vector(given.ctypes.data), _vector(SIZE), 2, kernel)
        assert np.array_equal(got, given), kernel
    print(f"{platform.machine()} copied {SIZE} bytes with each of {', '.join(_native.KERNELS)}")


if __name__ == "__main__":
    main()
