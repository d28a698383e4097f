"""The conformance kit: one class to derive from."""

from __future__ import annotations

from datadist.testing.families.control import Control
from datadist.testing.families.data import Data
from datadist.testing.families.declaration import Declaration
from datadist.testing.families.end_to_end import EndToEnd
from datadist.testing.families.failures import Failures
from datadist.testing.families.fence import Fence
from datadist.testing.families.in_flight import InFlight
from datadist.testing.families.known_ways import KnownWays
from datadist.testing.families.lifecycle import Lifecycle
from datadist.testing.families.linking import Linking
from datadist.testing.families.owners import Owners
from datadist.testing.families.parallel import Parallel
from datadist.testing.families.registration import Registration
from datadist.testing.families.silent_hosts import SilentHosts

__all__ = ["TransportConformance"]


class TransportConformance(
    EndToEnd,
    SilentHosts,
    Owners,
    InFlight,
    Fence,
    Failures,
    Control,
    KnownWays,
    Parallel,
    Data,
    Linking,
    Registration,
    Lifecycle,
    Declaration,
):
    """Tests every requirement of `datadist.transport`, in real processes.

    ::

        class TestAcme(TransportConformance):
            transport = "acme"

    Only ``capabilities``, and whether links have a `known_way`, decide which tests are skipped. These
    attributes may be set:

    ``transport``
        Name of the entry point; the transport must be installed and usable here.
    ``timeout_scale``
        Multiplies every deadline, for slow machines.
    ``extra``
        Options ``datadist.<name>.*`` of the transport, without that prefix.
    ``foreign_memory``
        Name of the function, ``"module:function"``, that makes memory as users of the transport do:
        from a size and a placement, its address (aligned as declared) and an object that keeps it.
        Default: memory of the process, which no accelerator's memory is.
    ``trusting_asker``
        Name of a function, ``"module:function"``, for transports whose owners move the bytes. It is
        called with an open link and a peer's rank, in the process that asks. Afterwards this link
        asks that rank for any range and any access, without a check of its own: only the owner can
        refuse. Default: the kit widens the ranges that it finds in offers, if it finds any.
    ``far``
        True: each rank is on a host of its own, and ranks meet over the network. The hosts are network
        namespaces where those can be made (root, ``ip``), else runtime directories and addresses of
        loopback; ``"namespaces"`` or ``"directories"`` chooses. An option's value may contain
        ``{device}`` and ``{address}``, which are those of the rank's host: `eth0` and an address of
        the namespace, or `lo` and one of loopback.
    ``far_hosts``
        How many hosts there are, 2 to 4. With 2 the ranks 0 and 2 are on the first one, 1 and 3 on the
        second one: for transports that treat near and far ranks of a link differently.
    ``transport_options(rank)``, ``rank_table(size)``, ``peer_address(rank)``
        Class methods: all options, the text of the rank table of a link of 2 to
        4 ranks, and the network address of a rank. The defaults are device ids equal to ranks on
        127.0.0.1; with ``far`` on the hosts, which ``host(rank)`` describes, with their address as
        ``listen_address`` and a key.
    """
