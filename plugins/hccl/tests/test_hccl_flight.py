"""Transfers whose time is over: what is stopped, what goes on, and how that ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hccl_sim import ranks
from hccl_sim.ranks import MIB, Ranks

from datadist.transport import InFlight, Placement
from tests.nodes import Here

Start = Callable[..., Ranks]

HCCS = {"HCCL_INTRA_ROCE_ENABLE": "0", "HCCL_INTRA_PCIE_ENABLE": "1"}
ONE = [(0, 0, MIB)]
SOON = 30.0
"""Seconds within which everything ends that must not wait."""
OLD, NEW = b"\0" * ranks.SIZE, b"\1" * ranks.SIZE


def _time_out_stuck(
    group: Ranks, name: str, write: bool = False, local: str = "device"
) -> tuple[str, bool]:
    """A transfer of rank 0 that never moves, and is late; its error's type and link_usable."""
    group[0].do(partial(ranks.sim, stuck=True), "tasks")
    move = partial(ranks.try_move, timeout=0.5, write=write, local=local)
    kind, usable, took, text = group[0].do(move, name, 1, ONE)
    assert 0.4 < took < SOON  # the library counts in milliseconds
    assert "not complete after 0.5 s" in text
    return kind, usable


def _link_again(group: Ranks) -> None:
    group.link("again")
    group[0].do(ranks.move, "again", 1, ONE)
    assert group[0].do(ranks.get, "device") == group[1].do(ranks.get, "device", MIB) + OLD[MIB:]
    group.finish()


def test_a_stuck_transfer_over_hccs_times_out_and_moves_nothing_later(start_ranks: Start) -> None:
    group = start_ranks(2, 1, HCCS).start()
    group.link()
    group[1].do(ranks.put, "device", NEW)
    _time_out_stuck(group, "link")
    assert group[0].do(ranks.settled) is None
    group[0].do(ranks.sim, "clear")
    assert [node.do(ranks.get, "device") for node in group.nodes] == [OLD, NEW]
    group[0].do(ranks.move, "link", 1, ONE)
    assert all(took < SOON for _, took in group.close())
    _link_again(group)


@pytest.mark.parametrize("write", [False, True])
def test_a_stuck_transfer_over_rdma_goes_on_and_the_link_stays(
    start_ranks: Start, write: bool
) -> None:
    group = start_ranks(3, 3).start()
    group.link()
    group[int(not write)].do(ranks.put, "device", NEW)
    _time_out_stuck(group, "link", write)
    assert group[0].do(ranks.settled) is False
    kind, usable, _, text = group[0].do(partial(ranks.try_move, timeout=0.1), "link", 1, ONE)
    assert (kind, usable) == ("TransferTimeout", True)
    assert "an earlier transfer with rank 1 is still in flight" in text
    group[0].do(ranks.sim, "clear")
    group[0].do(ranks.move, "link", 1, ONE)
    group[0].do(ranks.move, "link", 2, ONE)
    group.finish()


def test_what_goes_on_settles_when_it_has_moved(start_ranks: Start) -> None:
    group = start_ranks(2).start()
    group.link()
    group[1].do(ranks.put, "device", NEW)
    _time_out_stuck(group, "link")
    assert group[0].do(ranks.settled) is False
    assert group[0].do(ranks.get, "device") == OLD
    group[0].do(ranks.sim, "clear")
    assert group[0].do(ranks.settled, 30.0) is True
    assert group[0].do(ranks.get, "device") == NEW[:MIB] + OLD[MIB:]
    group.finish()


@pytest.mark.parametrize(
    ("symbol", "last"), [("aclrtSynchronizeStreamWithTimeout", 1), ("aclrtStreamQuery", 1 << 30)]
)
def test_what_goes_on_and_fails_is_not_settled_before_the_end_of_the_link(
    start_ranks: Start, symbol: str, last: int
) -> None:
    group = start_ranks(2).start()
    group.link()
    _time_out_stuck(group, "link")
    group[0].do(partial(ranks.sim, last=last), "fault", symbol, 507057)
    group[0].do(ranks.sim, "tasks")
    assert group[0].do(ranks.settled, 1.0) is False
    assert group[0].do(partial(ranks.try_move, timeout=0.1), "link", 1, ONE)[0] == "TransferTimeout"
    group.close()
    _link_again(group)


@pytest.mark.parametrize("end", ["force", "close"])
def test_what_goes_on_is_ended_by(start_ranks: Start, end: str) -> None:
    group = start_ranks(3, 3).start()
    group.link()
    group[1].do(ranks.put, "device", NEW)
    _time_out_stuck(group, "link")
    if end == "close":
        assert group[0].do(ranks.close_link, "link")[1] < SOON
        assert group[0].do(ranks.settled) is True
    else:
        assert group[0].do(ranks.force, "link", 1) < SOON
        assert group[0].do(ranks.settled) is True
        for rank in (1, 2):
            kind, usable, _, text = group[0].do(ranks.try_move, "link", rank, ONE)
            assert (kind, usable) == ("TransferError", False)
            assert "only the end of the link stopped it" in text
    group[0].do(ranks.sim, "clear")
    assert [node.do(ranks.get, "device") for node in group.nodes[:2]] == [OLD, NEW]
    group.finish()


@pytest.mark.parametrize("servers", [1, 2])
def test_force_without_anything_in_flight_ends_one_rank_only(
    start_ranks: Start, servers: int
) -> None:
    group = start_ranks(3, 3 if servers == 2 else 1, HCCS).start()
    group.link()
    assert group[0].do(ranks.force, "link", 1) < SOON
    assert group[0].do(ranks.try_move, "link", 1, ONE)[:2] == ("TransferError", False)
    group[0].do(ranks.move, "link", 2, ONE)
    group.finish()


@pytest.mark.parametrize("servers", [1, 2])
def test_a_stuck_transfer_by_the_staging_buffer_is_ended(start_ranks: Start, servers: int) -> None:
    """Other transfers need that buffer, so this one cannot go on."""
    group = start_ranks(2, servers, HCCS).start()
    group.link(labels=("host", "device"))
    group[0].do(_allocate_late)
    group[1].do(ranks.put, "device", NEW)
    kind, usable = _time_out_stuck(group, "link", local="late")
    assert (kind, usable) == ("TransferTimeout", servers == 1)
    assert group[0].do(ranks.settled) is None
    group[0].do(ranks.sim, "clear")
    assert group[0].do(ranks.get, "late") == OLD
    group.finish()


def test_who_waits_for_what_goes_on_does_not_hold_the_staging_buffer(start_ranks: Start) -> None:
    group = start_ranks(3, 3).start()
    group.link()
    group[0].do(_allocate_late)
    group[2].do(ranks.put, "device", NEW)
    _time_out_stuck(group, "link")
    group[0].do(ranks.sim, "clear")
    group[0].do(_never_settles, True)
    group[0].do(_wait_in_background)
    group[0].do(partial(ranks.move, local="late", timeout=SOON), "link", 2, ONE)
    assert group[0].do(ranks.get, "late") == NEW[:MIB] + OLD[MIB:]
    group[0].do(_never_settles, False)
    assert group[0].do(_end_of_background)
    group.finish()


def _never_settles(here: Here, stays: bool) -> None:
    path = _path(here)
    if stays:
        path.flight = Stays(path.flight)
    else:
        path.flight.stays = False


class Stays:
    """What goes on until the test says otherwise."""

    def __init__(self, flight: InFlight) -> None:
        self.stays, self.asked = True, threading.Event()
        self._flight = flight

    def settled(self) -> bool:
        self.asked.set()
        return not self.stays and self._flight.settled()


def _wait_in_background(here: Here) -> None:
    done = here.any["done"] = threading.Event()

    def move() -> None:
        ranks.move(here, "link", 1, ONE, local="late", timeout=10 * SOON)
        done.set()

    threading.Thread(target=move).start()
    assert _path(here).flight.asked.wait(SOON)


def _path(here: Here) -> Any:
    return ranks.of(here).links["link"]._paths[1]  # type: ignore[attr-defined]


def _end_of_background(here: Here) -> bool:
    ended: threading.Event = here.any["done"]
    return ended.wait(SOON)


def _allocate_late(here: Here) -> None:
    own = ranks.of(here)
    own.regions["late"] = own.transport.allocate(ranks.SIZE, Placement.DEVICE)
