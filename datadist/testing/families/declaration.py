"""The declarations of the class must be complete and consistent."""

from __future__ import annotations

import json
import re

from datadist.testing import acts
from datadist.testing.bench import Bench
from datadist.testing.families.kit import Kit
from datadist.transport import API_VERSION, Capabilities, Placement


class Declaration(Kit):
    """Class attributes, probe, capabilities, packaging."""

    def test_class_is_complete(self, bench: Bench) -> None:
        """Version of the interface, priority and probe."""
        declared = bench.bare(0).do(acts.declared, self.transport)
        assert declared.api_version == API_VERSION
        assert type(declared.priority) is int
        assert declared.probe.usable is True, declared.probe.reason
        assert declared.probe.reason, "say what was found: people read it"

    def test_probe_is_quick(self, bench: Bench) -> None:
        """`auto` and `datadist backends` probe everything that is installed."""
        declared = bench.bare(0).do(acts.declared, self.transport)
        assert declared.probe_seconds < 2 * self.timeout_scale

    def test_distribution_requires_datadist(self, bench: Bench) -> None:
        """Only the metadata tells installers which datadist versions a plugin supports."""
        declared = bench.bare(0).do(acts.declared, self.transport)
        pins = [r for r in declared.requirements if _name(r) == "datadist"]
        assert pins, f"{declared.distribution} does not list datadist in its dependencies"
        assert "<" in pins[0] or "==" in pins[0] or "~=" in pins[0], (
            f"{pins[0]!r} has no upper bound: a later datadist may have another interface"
        )

    def test_capabilities_make_sense(self, bench: Bench) -> None:
        """Types and ranges."""
        declared = bench.capabilities
        assert isinstance(declared, Capabilities)
        assert declared.placements, "memory of some placement must be possible"
        assert declared.placements <= set(Placement)
        assert declared.host_addressable <= set(Placement)
        assert declared.alignment >= 1
        assert declared.alignment & (declared.alignment - 1) == 0, "a power of two"
        assert all(limit > 0 for limit in declared.max_registered.values())
        assert set(declared.max_registered) <= declared.placements

    def test_capabilities_are_constant(self, bench: Bench) -> None:
        """Core may read them at any time."""
        process = bench.process(0)
        again = process.do(acts.set_up, self.transport, self.transport_options(0))
        assert again == bench.capabilities

    def test_description_is_for_people(self, bench: Bench) -> None:
        """Facts that can be printed and sent in a report."""
        json.dumps(bench.process(0).do(acts.describe), default=str)

    def test_rank_tables_are_accepted(self, bench: Bench) -> None:
        """Those with which the kit links."""
        for size in (2, 3, 4):
            for rank in range(size):
                outcome = bench.process(0).do(acts.check_table, self.rank_table(size), rank)
                assert outcome.ok, f"rank {rank} of {size}: {outcome}"


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
