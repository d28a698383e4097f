"""Memory: allocated, registered, refused, copied."""

from __future__ import annotations

from array import array

import pytest

from datadist.testing import memory_operations
from datadist.testing.families.kit import KINDS, Kit, memory_of, need_foreign
from datadist.testing.pattern import ExpectedWrite
from datadist.testing.rules import rule
from datadist.testing.testbed import MIB, Testbed
from datadist.transport import Placement, RegistrationError, TransportError

NOWHERE = 1 << 46
"""An address that no process has mapped."""


class Registration(Kit):
    """`allocate`, `register`, `release` and `copy`."""

    @rule("Transport.allocate")
    @pytest.mark.parametrize("placement", list(Placement), ids=str)
    @pytest.mark.parametrize("size", [1, 4096, MIB + 1])
    def test_allocated_memory_is_zeroed(
        self, testbed: Testbed, size: int, placement: Placement
    ) -> None:
        """And has the size, placement and alignment that were asked for."""
        _need(testbed, placement)
        process = testbed.process(0)
        outcome = process.do(memory_operations.allocate, "new", size, placement)
        outcome.must_succeed(f"allocate({size}, {placement})")
        address, actual, where = outcome.value
        assert (actual, where) == (size, placement), (
            f"allocate({size}, {placement}) returned {actual} bytes of {Placement(where)}"
        )
        alignment = testbed.capabilities.alignment
        assert address % alignment == 0, (
            f"allocate returned address {address:#x}, but capabilities.alignment is {alignment}"
        )
        zero = process.do(memory_operations.is_zero, "new")
        assert zero, f"allocate({size}, {placement}) returned memory that is not zeroed"

    @rule("Transport.allocate")
    def test_memory_that_was_used_comes_back_zeroed(self, testbed: Testbed) -> None:
        """Content of one cache is not visible in the next one."""
        process = testbed.process(0)
        for _ in range(3):
            memory = testbed.allocate(process)
            process.do(memory_operations.release, memory.label)
            outcome = process.do(memory_operations.allocate, "again", MIB, testbed.placement())
            outcome.must_succeed("allocate after a release")
            zero = process.do(memory_operations.is_zero, "again")
            assert zero, "allocate returned memory that is not zeroed, after a release"
            process.do(memory_operations.release, "again")

    @rule("Transport.register")
    @pytest.mark.parametrize("kind", KINDS[2:])
    def test_registered_memory_stays_where_it_is(self, testbed: Testbed, kind: str) -> None:
        """Same address, size and content; and it can be registered again after a release."""
        process = testbed.process(0)
        for _ in range(2):
            memory = memory_of(testbed, process, kind)
            memory.check()
            process.do(memory_operations.release, memory.label)

    @rule("Capabilities.alignment")
    @pytest.mark.parametrize("placement", list(Placement), ids=str)
    def test_unaligned_memory_is_registered_where_declared(
        self, testbed: Testbed, placement: Placement
    ) -> None:
        """`alignment` is what registered addresses need, no more."""
        _need_foreign(testbed, placement)
        process = testbed.process(0)
        outcome = process.do(
            memory_operations.register, "odd", 4096, placement, self.foreign_memory, 1
        )
        outcome.must_succeed(f"alignment is {testbed.capabilities.alignment}")

    @rule("Transport.register")
    @pytest.mark.parametrize("placement", list(Placement), ids=str)
    def test_memory_that_is_not_there_is_refused(
        self, testbed: Testbed, placement: Placement
    ) -> None:
        """With an error at once, not with a crash later."""
        _need_foreign(testbed, placement)
        outcome = testbed.process(0).do(
            memory_operations.register_at, "bad", NOWHERE, MIB, placement
        )
        outcome.must_be(RegistrationError, f"nothing is mapped at {NOWHERE:#x}")

    @rule("Capabilities.placements")
    @pytest.mark.parametrize("placement", list(Placement), ids=str)
    def test_placements_that_are_not_declared_are_refused(
        self, testbed: Testbed, placement: Placement
    ) -> None:
        """With an error of the interface."""
        if placement in testbed.capabilities.placements:
            pytest.skip(f"capabilities.placements has {placement}")
        outcome = testbed.process(0).do(memory_operations.allocate, "bad", MIB, placement)
        outcome.must_be(TransportError, f"allocate of {placement} memory")

    @rule("Capabilities.foreign_memory")
    def test_foreign_memory_is_refused_where_not_declared(self, testbed: Testbed) -> None:
        """With an error of the interface."""
        if testbed.capabilities.foreign_memory:
            pytest.skip("capabilities.foreign_memory is True")
        outcome = testbed.process(0).do(
            memory_operations.register, "bad", MIB, testbed.placement(), None
        )
        outcome.must_be(TransportError, "memory of the user, which is not declared")

    @rule("Transport.allocate")
    @pytest.mark.parametrize("placement", list(Placement), ids=str)
    def test_too_much_memory_is_refused(self, testbed: Testbed, placement: Placement) -> None:
        """By an error that core turns into "out of memory"."""
        _need(testbed, placement)
        text = testbed.process(0).do(memory_operations.allocate_too_much, 1 << 55, placement)
        assert text in ("MemoryError", "RegistrationError"), (
            f"allocate of {1 << 55} bytes: {text}; expected MemoryError or RegistrationError"
        )

    @rule("Region")
    def test_views_outlive_a_release(self, testbed: Testbed) -> None:
        """If a region has a keeper, its memory stays valid as long as the keeper is referenced."""
        process = testbed.process(0)
        if testbed.placement() not in testbed.capabilities.host_addressable:
            pytest.skip(f"capabilities.host_addressable is without {testbed.placement()}")
        memory = testbed.allocate(process)
        if process.do(memory_operations.touch_after_release, memory.label) is None:
            pytest.skip("regions of this transport have no keeper")

    @rule("Transport.copy")
    @pytest.mark.parametrize("target", KINDS[:2])
    @pytest.mark.parametrize("source", KINDS[:2])
    def test_local_copies(self, testbed: Testbed, source: str, target: str) -> None:
        """Between regions of any placement, several segments at once."""
        process = testbed.process(0)
        src, dst = memory_of(testbed, process, source), memory_of(testbed, process, target)
        here, there, length = (
            array("q", column) for column in ((1, 5000, 70000), (3, 9001, 0), (999, 4096, 1))
        )
        outcome = process.do(
            memory_operations.copy,
            array("q", [dst.address + at for at in here]),
            array("q", [src.address + at for at in there]),
            length,
        )
        outcome.must_succeed(f"copy from {source} to {target}")
        dst.check([ExpectedWrite(src.seed, src.size, here, there, length)])


def _need(testbed: Testbed, placement: Placement) -> None:
    if placement not in testbed.capabilities.placements:
        pytest.skip(f"capabilities.placements is without {placement}")


def _need_foreign(testbed: Testbed, placement: Placement) -> None:
    _need(testbed, placement)
    need_foreign(testbed, placement)
