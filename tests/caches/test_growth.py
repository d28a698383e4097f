"""Work grows no faster than what it is for: keys, caches, registrations, acknowledgements, pulls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest

from datadist.caches.directory import KeyDirectory, KeyName
from datadist.caches.memory import Memory
from datadist.caches.owned import Layout, OwnCache, OwnDirectory
from datadist.caches.peers import PeerView
from datadist.caches.pool import Run
from datadist.caches.pool_config import PoolConfig
from datadist.caches.revocations import Revocations
from datadist.control.messages import Binding, Directory, Entry, Message
from datadist.status import LLMException
from datadist.transfers.resolve import ById, find
from datadist.transport import Offer, Placement, Region
from tests.growth import MOST, growth

T = TypeVar("T")

DEVICE = Placement.DEVICE
MAX_SINGLE_INSERTS = 1500


class _Transport:
    """Memory that is not there; ``held`` is what every registration waits for."""

    def __init__(self) -> None:
        self.capabilities = SimpleNamespace(max_registered={DEVICE: 1 << 50})
        self.batches = 0
        self.registering_now = threading.Event()
        self.held = threading.Event()
        self.held.set()

    def allocate(self, size: int, placement: Placement) -> Region:
        return Region(1 << 40, size, placement)

    def registering(self) -> AbstractContextManager[None]:
        self.batches += 1
        return nullcontext()

    def register(self, address: int, size: int, placement: Placement) -> Region:
        self.registering_now.set()
        assert self.held.wait(60)
        return Region(address, size, placement)

    def release(self, region: Region) -> None:
        pass


def _memory() -> tuple[Memory, _Transport]:
    transport: Any = _Transport()
    return Memory(transport), transport


def _entry(cache_id: int, bindings: Sequence[Binding] = ()) -> Entry:
    return Entry(
        cache_id=cache_id, blocks=False, bases=[64], stride=1, count=1 << 17, tensor_size=1 << 17,
        data_type=2, placement=0, pooled=True, accessible=True, regions=[1], bindings=list(bindings),
    )  # fmt: skip


def _binding(number: int, key: int | None = None) -> Binding:
    key = number if key is None else key
    return Binding(id=number, slot=number, space="request", key=key, model=0)


def _view() -> PeerView:
    def send(_message: Message) -> None:
        """Nobody hears it."""

    session: Any = SimpleNamespace(send=send, send_soon=send, closed=False)
    return PeerView(session)


def _each(call: Callable[[T], None], values: Iterable[T]) -> None:
    for value in values:
        call(value)


ORDERS = pytest.mark.parametrize("order", [1, -1])


# -- registered memory ---------------------------------------------------------------------------


@ORDERS
@pytest.mark.parametrize("at_once", [True, False])
def test_registration_grows_with_the_addresses(at_once: bool, order: int) -> None:
    def prepare(count: int) -> Callable[[], object]:
        memory, _ = _memory()
        addresses = [4096 * n for n in range(1, count + 1)][::order]

        def work() -> None:
            if at_once:
                memory.unregister(memory.register(addresses, 64, DEVICE, 1), 1)
                return
            ids = [memory.register([address], 64, DEVICE, address) for address in addresses]
            for region_ids, address in zip(ids, addresses, strict=True):
                memory.unregister(region_ids, address)

        return work

    assert growth(prepare, MAX_SINGLE_INSERTS) < MOST


def test_the_transport_hears_what_is_registered_together() -> None:
    memory, transport = _memory()
    ids = memory.register([4096 * n for n in range(1, 100)], 64, DEVICE, 1)
    assert transport.batches == 1
    assert memory.register([4096], 64, DEVICE, 2) == ids[:1]
    assert transport.batches == 1, "nothing was registered"


def test_nothing_waits_for_a_registration_that_takes_long() -> None:
    memory, transport = _memory()
    memory.add_pool(DEVICE, PoolConfig(memory_size=4096, page_shift=10))
    transport.held.clear()
    thread = threading.Thread(target=memory.register, args=([4096], 64, DEVICE, 1), daemon=True)
    thread.start()
    assert transport.registering_now.wait(60)
    done = threading.Event()

    def others() -> None:
        memory.pool_usage(DEVICE)
        runs: list[Run] = []
        memory.allocate(DEVICE, [1], runs)
        memory.give_back(DEVICE, 1, runs)
        memory.expose("link")
        memory.empty()
        done.set()

    threading.Thread(target=others, daemon=True).start()
    assert done.wait(30), "it waits for the transport"
    assert thread.is_alive()
    transport.held.set()
    thread.join()


def test_more_regions_than_an_offer_takes_are_refused() -> None:
    memory, _ = _memory()
    addresses = [128 * n for n in range(1, Offer.MAX_REGIONS + 1)]
    ids = memory.register(addresses, 64, DEVICE, 1)
    with pytest.raises(LLMException, match=f"more than the {Offer.MAX_REGIONS} that can be"):
        memory.register([1 << 40], 64, DEVICE, 2)
    memory.unregister(ids[:1], 1)
    memory.register([1 << 40], 64, DEVICE, 2)


@ORDERS
def test_ranges_given_together_that_overlap_in_part_are_one_region(order: int) -> None:
    memory, _ = _memory()
    memory.register([4096, 8192, 8200][::order], 64, DEVICE, 1)
    exposed = memory.expose("link").values()
    assert sorted((region.address, region.size) for region in exposed) == [(4096, 64), (8192, 72)]


# -- keys ----------------------------------------------------------------------------------------


@ORDERS
@pytest.mark.parametrize("same", [True, False])
def test_unbinding_grows_with_the_keys(same: bool, order: int) -> None:
    """Also of keys that are equal."""

    def prepare(count: int) -> Callable[[], object]:
        directory = KeyDirectory()
        directory.put(_entry(1, [_binding(n, 5 if same else n) for n in range(count)]))
        numbers = range(count)[::order]
        return lambda: _each(lambda number: directory.unbind(1, number), numbers)

    assert growth(prepare, MAX_SINGLE_INSERTS) < MOST


@ORDERS
def test_caches_with_one_key_are_forgotten_in_a_time_of_their_own(order: int) -> None:
    def prepare(count: int) -> Callable[[], object]:
        directory = KeyDirectory()
        for number in range(count):
            directory.put(_entry(number, [_binding(number, 5)]))
        return lambda: [directory.remove(number) for number in range(count)[::order]]

    assert growth(prepare, MAX_SINGLE_INSERTS) < MOST


@ORDERS
def test_pulls_by_id_and_slot_grow_with_their_number(order: int) -> None:
    def prepare(count: int) -> Callable[[], object]:
        directory = KeyDirectory()
        directory.put(_entry(1, [_binding(n) for n in range(count)]))

        def work() -> None:
            for slot in range(count)[::order]:
                found = find(directory, ById(1, slot), set())
                assert found is not None
                assert found.binding is not None
                directory.unbind(1, found.binding.id)

        return work

    assert growth(prepare, MAX_SINGLE_INSERTS) < MOST


def test_of_two_keys_with_one_id_the_second_is_never_found() -> None:
    directory = KeyDirectory()
    directory.put(_entry(1, [_binding(1, 5), _binding(1, 6)]))
    assert directory.find(KeyName("request", 6, 0)) is None
    directory.unbind(1, 1)
    assert directory.find(KeyName("request", 5, 0)) is None
    directory.remove(1)
    assert directory.find(KeyName("request", 6, 0)) is None


def test_a_slot_is_found_by_its_keys_that_are_left() -> None:
    directory = KeyDirectory()
    keys = [Binding(id=n, slot=3, space="request", key=n, model=0) for n in (1, 2)]
    prefix = Binding(id=3, slot=4, space="prefix", key=3, model=0)
    directory.put(_entry(1, [*keys, prefix]))
    assert directory.request_at(1, 3, ()) == keys[0]
    assert directory.request_at(1, 3, (1,)) == keys[1]
    assert directory.request_at(1, 4, ()) is None
    directory.unbind(1, 1)
    assert directory.request_at(1, 3, ()) == keys[1]
    directory.put(_entry(1, [keys[0]]))
    assert directory.request_at(1, 3, ()) == keys[0]
    directory.remove(1)
    assert directory.request_at(1, 3, ()) is None


# -- peers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", [True, False])
def test_changes_during_a_long_pull_grow_with_their_number(busy: bool) -> None:
    """Whether others come and go meanwhile, or not."""

    def prepare(count: int) -> Callable[[], object]:
        view = _view()
        view.begin_pull(0)

        def work() -> None:
            for number in range(1, count + 1):
                if busy:
                    view.begin_pull(number)
                view.apply(Directory(seq=number, remove=[number]))
                if busy:
                    view.end_pull(number)
            view.end_pull(0)

        return work

    assert growth(prepare, MAX_SINGLE_INSERTS) < MOST


def test_changes_with_consumed_keys_cost_nothing_for_the_other_keys() -> None:
    def prepare(count: int) -> Callable[[], object]:
        view = _view()
        view.apply(Directory(seq=1, upsert=[_entry(1, [_binding(n) for n in range(count)])]))
        view.consumed.add(count - 1)
        changes = [Directory(seq=n, upsert=[_entry(n)]) for n in range(2, count)]
        return lambda: _each(view.apply, changes)

    assert growth(prepare, MAX_SINGLE_INSERTS) < MOST


def test_what_was_pulled_is_forgotten_with_its_keys() -> None:
    view = _view()
    view.apply(Directory(seq=1, upsert=[_entry(n, [_binding(n)]) for n in (1, 2, 3)]))
    view.consumed |= {1, 2, 3}
    view.apply(Directory(seq=2, remove=[1]))
    assert view.consumed == {2, 3}
    view.apply(Directory(seq=3, upsert=[_entry(2, [_binding(2)])]))
    assert view.consumed == {2, 3}, "it has the key still"
    view.apply(Directory(seq=4, upsert=[_entry(2)]))
    assert view.consumed == {3}
    view.apply(Directory(seq=5, reset=True, last=False, upsert=[_entry(4)]))
    view.apply(Directory(seq=6, upsert=[_entry(3, [_binding(3)])]))
    assert view.consumed == {3}, "the second part had it"
    view.apply(Directory(seq=7, reset=True))
    assert not view.consumed


@ORDERS
def test_acknowledgements_grow_with_what_waits_for_them(order: int) -> None:
    def prepare(count: int) -> Callable[[], object]:
        revocations, view, done = Revocations(), _view(), list[int]()
        view.seq_sent = count
        for number in range(1, count + 1)[::order]:
            revocations.when_acked({view: number}, lambda number=number: done.append(number))  # type: ignore[misc]

        def work() -> None:
            for number in range(1, count + 1):
                revocations.on_ack(view, number)
            assert done == list(range(1, count + 1))

        return work

    assert growth(prepare, MAX_SINGLE_INSERTS) < MOST


# -- our own -------------------------------------------------------------------------------------


def _owned(tensors: int, caches: int = 1, keys: int = 1) -> tuple[OwnDirectory, list[OwnCache]]:
    memory, _ = _memory()
    owned, made = OwnDirectory(memory), []
    for number in range(1, caches + 1):
        bases = tuple(number << 36 | 4096 * n for n in range(1, tensors + 1))
        layout = Layout(False, bases, 1, 64, 64, DEVICE, 2)
        made.append(OwnCache(number, layout, True, True, (1,)))
        names = [(n, KeyName("request", number << 20 | n, 0)) for n in range(keys)]
        owned.add(made[-1], names, unique=True)
    return owned, made


@ORDERS
def test_removing_keys_grows_with_their_number(order: int) -> None:
    def prepare(count: int) -> Callable[[], object]:
        owned, _ = _owned(1, keys=count + 1)
        names = [KeyName("request", 1 << 20 | n, 0) for n in range(count + 1)][::order]
        return lambda: _each(owned.remove_key, names[:-1])

    assert growth(prepare, MAX_SINGLE_INSERTS) < MOST


def test_messages_of_pulled_layers_cost_nothing_for_the_tensors() -> None:
    def prepare(count: int) -> Callable[[], object]:
        owned, (cache,) = _owned(count)
        (binding,) = cache.bindings
        return lambda: _each(lambda _: owned.consumed(1, binding, 0, count - 1), range(count))

    assert growth(prepare, MAX_SINGLE_INSERTS) < MOST


def test_requests_for_addresses_cost_nothing_for_the_other_caches() -> None:
    def prepare(count: int) -> Callable[[], object]:
        owned, made = _owned(1, caches=count)
        at = np.array([made[-1].layout.bases[0]])
        owned.caches_at(at, np.array([1]))
        return lambda: [owned.caches_at(at, np.array([1])) for _ in range(MAX_SINGLE_INSERTS)]

    assert growth(prepare, MAX_SINGLE_INSERTS, MOST / 2) < MOST / 2


def test_addresses_are_looked_for_in_the_caches_there_are_now() -> None:
    owned, caches = _owned(1, caches=2)
    at = [np.array([cache.layout.bases[0]]) for cache in caches]
    one = np.array([1])
    assert owned.caches_at(at[0], one) == {1}
    assert owned.caches_at(at[0], one, data_type=2) == {1}
    with pytest.raises(LLMException):
        owned.caches_at(at[0], one, data_type=3)
    owned.deallocate(1)  # which a key keeps
    with pytest.raises(LLMException):
        owned.caches_at(at[0], one)
    assert owned.caches_at(at[0], one, freed_too=True) == {1}
    assert owned.caches_at(at[1], one) == {2}
