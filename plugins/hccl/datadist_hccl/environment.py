"""Environment variables of HCCL that decide how ranks of one server are connected.

HCCL reads its environment once per process, when the first communicator is created. So the
resulting values are written back to the environment before that.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, MutableMapping

from datadist.transport import TransportError

log = logging.getLogger("datadist.hccl")

ROCE = "HCCL_INTRA_ROCE_ENABLE"
PCIE = "HCCL_INTRA_PCIE_ENABLE"
MISSPELLED = "hccl_inra_roce_enable"
"""As the documentation of `link` spells it; HCCL does not know it."""

_lock = threading.Lock()
_known: dict[str, str] | None = None
"""The values that HCCL has read; None before."""


def mark_environment_read(environ: Mapping[str, str]) -> None:
    """Record that HCCL has created its first communicator in this process and read its variables."""
    global _known
    with _lock:
        if _known is None:
            _known = {name: environ[name] for name in (ROCE, PCIE) if name in environ}


def settle(environ: MutableMapping[str, str]) -> bool | None:
    """Whether ranks of one server use RoCE; None where nobody chose.

    The spelling of the documentation of `link` is taken for the variable that is meant. HCCL wants
    the variable of RoCE and that of PCIe (which stands for HCCS too) given as a pair: a missing one
    is added where the other decides.

    What is changed after HCCL has read it has no effect, and a warning says so.

    Raises :class:`TransportError` for values that HCCL would refuse.
    """
    if _known is not None:
        return _settle_known(environ, _known)
    return _settle(environ)


def _settle(environ: MutableMapping[str, str]) -> bool | None:
    if MISSPELLED in environ and ROCE not in environ:
        environ[ROCE] = environ[MISSPELLED]
        log.warning("%s is taken for %s, which is the variable that HCCL reads", MISSPELLED, ROCE)
    roce, pcie = _flag(environ, ROCE), _flag(environ, PCIE)
    if roce and pcie:
        raise TransportError(
            f"{ROCE} and {PCIE} are both 1, which HCCL refuses: set {PCIE}=0 for RoCE inside a "
            f"server, or {ROCE}=0 for HCCS"
        )
    if roce is False and pcie is None:
        environ[PCIE] = "1"
    if roce is None and pcie is False:
        raise TransportError(
            f"{PCIE} is 0 and {ROCE} is not set, which HCCL refuses: set {ROCE}=1 for RoCE inside a "
            f"server, or {ROCE}=0 and {PCIE}=1 for HCCS"
        )
    return False if roce is None and pcie else roce


def _settle_known(environ: Mapping[str, str], known: Mapping[str, str]) -> bool | None:
    for name in (ROCE, PCIE):
        if environ.get(name) != known.get(name):
            log.warning(
                "%s=%s has no effect: HCCL has read its variables when this process made its first "
                "communicator, with %s; set it before the first link, in a new process",
                name, environ.get(name, ""), known.get(name, "none"),
            )  # fmt: skip
    return _settle(dict(known))


def _flag(environ: MutableMapping[str, str], name: str) -> bool | None:
    value = environ.get(name)
    if value not in (None, "0", "1"):
        raise TransportError(f'{name} is {value!r}, it must be "0" or "1"')
    return None if value is None else value == "1"
