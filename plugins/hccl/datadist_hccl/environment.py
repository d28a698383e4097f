"""Environment variables of HCCL that decide how ranks of one server are connected.

HCCL reads its environment once per process, when the first communicator is made; what is settled
here is therefore written back before that.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping

from datadist.transport import TransportError

log = logging.getLogger("datadist.hccl")

ROCE = "HCCL_INTRA_ROCE_ENABLE"
PCIE = "HCCL_INTRA_PCIE_ENABLE"
MISSPELLED = "hccl_inra_roce_enable"
"""As the documentation of `link` spells it; HCCL does not know it."""


def settle(environ: MutableMapping[str, str]) -> bool | None:
    """Whether ranks of one server use RoCE; None where nobody chose.

    The spelling of the documentation of `link` is taken for the variable that is meant. HCCL wants
    the variable of RoCE and that of PCIe (which stands for HCCS too) given as a pair: a missing one
    is added where the other decides.

    Raises :class:`TransportError` for values that HCCL would refuse.
    """
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


def _flag(environ: MutableMapping[str, str], name: str) -> bool | None:
    value = environ.get(name)
    if value not in (None, "0", "1"):
        raise TransportError(f'{name} is {value!r}, it must be "0" or "1"')
    return None if value is None else value == "1"
