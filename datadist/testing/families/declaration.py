"""The declarations of the class must be complete and consistent."""

from __future__ import annotations

import json
import re

from datadist.testing import operations
from datadist.testing.families.kit import Kit
from datadist.testing.testbed import Testbed
from datadist.transport import API_VERSION, Capabilities, Placement


class Declaration(Kit):
    """Class attributes, probe, capabilities, packaging."""

    def test_class_is_complete(self, testbed: Testbed) -> None:
        """Version of the interface, priority and probe."""
        declared = testbed.bare(0).do(operations.declared, self.transport)
        assert declared.api_version == API_VERSION
        assert type(declared.priority) is int
        assert declared.probe.usable is True, declared.probe.reason
        assert declared.probe.reason, "say what was found: people read it"

    def test_probe_is_quick(self, testbed: Testbed) -> None:
        """`auto` and `datadist backends` probe everything that is installed."""
        declared = testbed.bare(0).do(operations.declared, self.transport)
        assert declared.probe_seconds < 2 * self.timeout_scale

    def test_distribution_requires_datadist(self, testbed: Testbed) -> None:
        """Only the metadata tells installers which datadist versions a plugin supports."""
        declared = testbed.bare(0).do(operations.declared, self.transport)
        pins = [r for r in declared.requirements if _name(r) == "datadist"]
        assert pins, f"{declared.distribution} does not list datadist in its dependencies"
        assert "<" in pins[0] or "==" in pins[0] or "~=" in pins[0], (
            f"{pins[0]!r} has no upper bound: a later datadist may have another interface"
        )

    def test_capabilities_make_sense(self, testbed: Testbed) -> None:
        """Types and ranges."""
        declared = testbed.capabilities
        assert isinstance(declared, Capabilities)
        assert declared.placements, "memory of some placement must be possible"
        assert declared.placements <= set(Placement)
        assert declared.host_addressable <= set(Placement)
        assert declared.alignment >= 1
        assert declared.alignment & (declared.alignment - 1) == 0, "a power of two"
        assert all(limit > 0 for limit in declared.max_registered.values())
        assert set(declared.max_registered) <= declared.placements

    def test_capabilities_are_constant(self, testbed: Testbed) -> None:
        """Core may read them at any time."""
        process = testbed.process(0)
        again = process.do(operations.set_up, self.transport, self.transport_options(0))
        assert again == testbed.capabilities

    def test_description_is_for_people(self, testbed: Testbed) -> None:
        """Facts that can be printed and sent in a report."""
        json.dumps(testbed.process(0).do(operations.describe), default=str)

    def test_rank_tables_are_accepted(self, testbed: Testbed) -> None:
        """Those with which the kit links."""
        for size in (2, 3, 4):
            for rank in range(size):
                outcome = testbed.process(0).do(operations.check_table, self.rank_table(size), rank)
                assert outcome.ok, f"rank {rank} of {size}: {outcome}"


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
