"""One target under atheris: `python -m tests.fuzz.one TARGET CORPUS [libFuzzer options]`."""

from __future__ import annotations

import sys

import atheris

INSTRUMENTED = ["datadist", "datadist_shm", "datadist_rdma", "datadist_hccl", "tests.fuzz"]


def main() -> None:
    """Never returns."""
    name = sys.argv.pop(1)
    # The targets' modules are instrumented as they are imported here.
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.targets import opened
    with opened(name) as target:

        def one(data: bytes) -> None:
            target(data)

        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
