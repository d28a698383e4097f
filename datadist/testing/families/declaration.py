"""The declarations of the class must be complete and consistent."""

from __future__ import annotations

import json
import re

from datadist.base.texts import in_seconds
from datadist.testing import list_operations, operations
from datadist.testing.families.kit import Kit
from datadist.testing.rules import rule
from datadist.testing.testbed import Testbed
from datadist.transport import API_VERSION, Capabilities, Placement


class Declaration(Kit):
    """Class attributes, probe, capabilities, packaging."""

    @rule("Transport.api_version", "Transport.priority", "Transport.probe")
    def test_class_is_complete(self, testbed: Testbed) -> None:
        """Version of the interface, priority and probe."""
        declared = testbed.bare(0).do(operations.declared, self.transport)
        assert declared.api_version == API_VERSION, (
            f"api_version is {declared.api_version!r}, expected {API_VERSION}"
        )
        assert type(declared.priority) is int, f"priority is {declared.priority!r}, expected an int"
        assert declared.probe.usable is True, (
            f"probe says that the transport cannot be used here: {declared.probe.reason}"
        )
        assert declared.probe.reason, "probe().reason is empty: say what was found, people read it"

    @rule("Transport.probe")
    def test_probe_is_quick(self, testbed: Testbed) -> None:
        """`auto` and `datadist backends` probe everything that is installed."""
        declared = testbed.bare(0).do(operations.declared, self.transport)
        limit = 2 * self.timeout_scale
        assert declared.probe_seconds < limit, (
            f"probe took {declared.probe_seconds:.1f} s, it must end within {in_seconds(limit)}"
        )

    @rule("API_VERSION")
    def test_distribution_requires_datadist(self, testbed: Testbed) -> None:
        """Only the metadata tells installers which datadist versions a plugin supports."""
        declared = testbed.bare(0).do(operations.declared, self.transport)
        for distribution, requirements in declared.requirements.items():
            pins = [r for r in requirements if _name(r) == "datadist"]
            assert pins, f"{distribution} does not list datadist in its dependencies"
            assert "<" in pins[0] or "==" in pins[0] or "~=" in pins[0], (
                f"{pins[0]!r} of {distribution} has no upper bound: a later datadist may have another "
                "interface"
            )

    @rule("Capabilities")
    def test_capabilities_make_sense(self, testbed: Testbed) -> None:
        """Types and ranges."""
        declared = testbed.capabilities
        assert isinstance(declared, Capabilities), (
            f"capabilities is {declared!r}, expected datadist.transport.Capabilities"
        )
        assert declared.placements, "placements is empty: memory of some placement must be possible"
        for name in ("placements", "host_addressable", "max_registered"):
            wrong = set(getattr(declared, name)) - set(Placement)
            assert not wrong, f"{name} has {wrong}, expected members of Placement only"
        for name in ("alignment", "parallel"):
            value = getattr(declared, name)
            assert type(value) is int, f"{name} is {value!r}, expected an int"
            assert value >= 1, f"{name} is {value}, expected 1 or more"
        assert declared.alignment & (declared.alignment - 1) == 0, (
            f"alignment is {declared.alignment}, expected a power of two"
        )
        for placement, limit in declared.max_registered.items():
            assert limit > 0, f"max_registered of {placement} is {limit}, expected more than 0"
            assert placement in declared.placements, (
                f"max_registered has {placement}, which placements has not"
            )

    @rule("Transport.capabilities")
    def test_capabilities_are_constant(self, testbed: Testbed) -> None:
        """Core may read them at any time."""
        process = testbed.process(0)
        again = process.do(operations.set_up, self.transport, self.transport_options(0))
        assert again == testbed.capabilities, (
            f"capabilities changed from {testbed.capabilities} to {again}"
        )

    @rule("Transport.describe")
    def test_description_is_for_people(self, testbed: Testbed) -> None:
        """Facts that can be printed and sent in a report."""
        json.dumps(testbed.process(0).do(operations.describe), default=str)

    @rule("Transport.convert_list")
    def test_lists_are_converted_exactly(self, testbed: Testbed) -> None:
        """Lists that are in order, if any, and no other ones."""
        wrong = testbed.bare(0).do(list_operations.wrong_conversions, self.transport)
        assert not wrong, f"convert_list: {wrong[0]} ({len(wrong)} such calls)"

    @rule("Transport.check_table")
    def test_rank_tables_are_accepted(self, testbed: Testbed) -> None:
        """Those with which the kit links."""
        for size in (2, 3, 4):
            for rank in range(size):
                outcome = testbed.process(0).do(operations.check_table, self.rank_table(size), rank)
                outcome.must_succeed(f"rank {rank} of {size}")


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
