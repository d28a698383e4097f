"""For authors of transports: the conformance kit and a reference transport.

``TransportConformance`` needs pytest, which the extra ``datadist[testing]`` brings; the rest does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from datadist.testing.installing import installed
from datadist.testing.reference import ReferenceTransport

if TYPE_CHECKING:
    from datadist.testing.conformance import TransportConformance

__all__ = ["ReferenceTransport", "TransportConformance", "installed"]


def __getattr__(name: str) -> object:
    if name != "TransportConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import pytest
    except ImportError as error:
        raise ImportError(
            "the conformance kit needs pytest: pip install 'datadist[testing]'"
        ) from error
    pytest.register_assert_rewrite("datadist.testing.families", "datadist.testing.testbed")
    from datadist.testing.conformance import TransportConformance

    return TransportConformance
