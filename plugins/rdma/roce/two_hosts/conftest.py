"""The other machine, and a wire in order, for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from roce.nodes import lab, wait_for_other


@pytest.fixture(autouse=True)
def wire_in_order() -> Iterator[None]:
    """The other machine is up, and the wire is whole, before and after."""
    wait_for_other()
    yield
    lab(do="wire", cut=False, loss=0.0)
