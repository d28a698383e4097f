"""Messages between programs, with and without a transfer: order, credits, and who is gone or hostile."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMException,
    ReceivedMessage,
)
from datadist.control.messages import AskRoom, Notice
from datadist.transfers.notices import MAX_BYTES, WINDOW
from tests import hosts, interrupts, nodes
from tests.hosts import Network
from tests.in_process_engine import PAIR, SIZE, TABLE, Engine, offer_of
from tests.nodes import Node, RemoteError
from tests.raw_peer import RawPeer, link, memory

SECONDS = 60
Start = Callable[..., Node]


def _send(here: nodes.Here, cluster: int, data: Any, times: int = 1, **options: Any) -> int:
    for _ in range(times):
        here.live.send_message(cluster, data, **options)
    return times


def _send_numbers(here: nodes.Here, cluster: int, numbers: range) -> None:
    for number in numbers:
        here.live.send_message(cluster, number.to_bytes(4, "big"), timeout_in_millis=60_000)


def _take(here: nodes.Here, count: int) -> list[tuple[int, bytes]]:
    """So many messages, waited for by the descriptor."""
    found: list[ReceivedMessage] = []
    deadline = time.monotonic() + SECONDS
    while len(found) < count and time.monotonic() < deadline:
        select.select([here.live.messages_fileno()], [], [], 1.0)
        found += here.live.messages()
    return [tuple(each) for each in found]


def _waiting(here: nodes.Here, count: int) -> bool:
    """Whether so many wait, in time; none is taken."""
    inbox = here.live._engine.notices.inbox  # type: ignore[union-attr]
    deadline = time.monotonic() + SECONDS
    while len(inbox) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    return len(inbox) == count


@pytest.fixture
def unlinked(start_node: Start) -> tuple[Node, Node]:
    """Two engines in one-sided mode, with a blocks cache and slots each."""
    made = []
    for cluster in (1, 2):
        node = start_node(cluster, enable_remote_cache_accessible=True)
        node.do(nodes.make, "blocks", "blocks", [8, 1024], 2, BlocksCacheKey(cluster))
        node.do(nodes.make, "slots", "cache", [2, 1024], 2)
        made.append(node)
    return made[0], made[1]


@pytest.fixture
def pair(unlinked: tuple[Node, Node]) -> tuple[Node, Node]:
    """The same two, linked."""
    nodes.link_pair(*unlinked)
    return unlinked


def _status(node: Node, *call: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(RemoteError) as caught:
        node.do(*call, **options)
    return str(caught.value.status), caught.value.text


# -- what arrives ----------------------------------------------------------------------------


def test_messages_arrive_in_order_and_say_who_sent_them(pair: tuple[Node, Node]) -> None:
    one, two = pair
    sent: list[Any] = [b"", b"first", bytearray(b"second"), np.arange(4, dtype=np.int32)]
    sent.append(bytes(range(256)) * 32)
    for data in sent:
        one.do(_send, 2, data)
    assert two.do(_take, len(sent)) == [(1, bytes(memoryview(data).cast("B"))) for data in sent]
    two.do(_send, 1, b"back")
    assert one.do(_take, 1) == [(2, b"back")]
    assert two.do(_take, 0) == []


def test_more_than_a_window_arrives_while_the_program_takes_them(pair: tuple[Node, Node]) -> None:
    one, two = pair
    count = 5 * WINDOW + 7
    one.begin(_send_numbers, 2, range(count))
    taken = two.do(_take, count)
    one.result()
    assert [int.from_bytes(data, "big") for _, data in taken] == list(range(count))


def test_data_that_is_no_message_is_refused(pair: tuple[Node, Node]) -> None:
    one, two = pair
    for data, kind, status, text in (
        ("text", "TypeError", "None", "data is a str"),
        (3, "TypeError", "None", "data is a int"),
        (np.array(["2020-01-01"], "M8[D]"), "TypeError", "None", "data is a ndarray"),
        (np.array([None]), "TypeError", "None", "data holds objects"),
        (bytes(MAX_BYTES + 1), "LLMException", "LLM_PARAM_INVALID", f"has {MAX_BYTES + 1} bytes"),
    ):
        with pytest.raises(RemoteError) as caught:
            one.do(_send, 2, data)
        assert (caught.value.kind, str(caught.value.status)) == (kind, status)
        assert text in caught.value.text
    assert _status(one, _send, 1, b"x")[0] == "LLM_PARAM_INVALID"  # its own cluster
    assert _status(one, _send, 7, b"x")[0] == "LLM_NOT_YET_LINK"
    assert _status(one, _send, 2, b"x", timeout_in_millis=0)[0] == "LLM_PARAM_INVALID"
    two.do(_send, 1, b"x")
    assert one.do(_take, 1) == [(2, b"x")]


# -- with transfers --------------------------------------------------------------------------


def _pull_and_push(here: nodes.Here) -> None:
    manager, blocks, slots = here.live.cache_manager, here.caches["blocks"], here.caches["slots"]
    for number in range(3):  # by the slow path, and by the cached route
        manager.pull_blocks(BlocksCacheKey(1), blocks, [0], [1], notify=b"pull %d" % number)
    manager.pull_cache(CacheKeyByIdAndIndex(1, slots.cache_id, 0), slots, notify=b"slot")
    here.arrays["blocks"][0][2] = 77
    for number in range(3):
        manager.push_blocks(BlocksCacheKey(1), blocks, [2], [number], notify=b"push %d" % number)
    manager.push_cache(CacheKeyByIdAndIndex(1, slots.cache_id, 1), slots, notify=b"slot pushed")


def _block(here: nodes.Here, number: int) -> int:
    return int(here.arrays["blocks"][0][number, 0])


def test_notify_comes_after_the_data_in_the_order_of_completion(pair: tuple[Node, Node]) -> None:
    one, two = pair
    two.begin(_pull_and_push)
    texts = [data.decode() for _, data in one.do(_take, 8)]
    assert texts == [
        "pull 0",
        "pull 1",
        "pull 2",
        "slot",
        "push 0",
        "push 1",
        "push 2",
        "slot pushed",
    ]
    two.result()
    assert [one.do(_block, number) for number in range(3)] == [77, 77, 77]


def _push_numbers(here: nodes.Here, count: int) -> None:
    manager, cache = here.live.cache_manager, here.caches["blocks"]
    for number in range(1, count + 1):
        here.arrays["blocks"][0][0] = number
        manager.push_blocks(
            BlocksCacheKey(1), cache, [0], [number % 8], notify=number.to_bytes(4, "big")
        )


def _sees_what_it_is_told(here: nodes.Here, count: int) -> list[int]:
    """Numbers of which the data was not there when the message came; newer data may be."""
    wrong, seen = [], 0
    while seen < count:
        select.select([here.live.messages_fileno()], [], [], 1.0)
        for message in here.live.messages():
            seen += 1
            number = int.from_bytes(message.data, "big")
            if here.arrays["blocks"][0][number % 8, 0] < number:
                wrong.append(number)
    return wrong


def test_the_data_is_there_when_the_message_comes(pair: tuple[Node, Node]) -> None:
    one, two = pair
    two.begin(_push_numbers, 300)
    assert one.do(_sees_what_it_is_told, 300) == []
    two.result()


def test_a_transfer_that_fails_tells_nobody(pair: tuple[Node, Node]) -> None:
    one, two = pair
    missing = BlocksCacheKey(1, 99)
    assert _status(two, nodes.pull_blocks, missing, "blocks", [0], [0], notify=b"x")[0] == (
        "LLM_KV_CACHE_NOT_EXIST"
    )
    two.do(nodes.pull_blocks, BlocksCacheKey(1), "blocks", [0], [0], notify=b"y")
    assert one.do(_take, 1) == [(2, b"y")]


def test_notify_that_is_no_message_is_refused_before_anything_moves(
    pair: tuple[Node, Node],
) -> None:
    one, two = pair
    one.do(nodes.fill, "blocks", 5)
    for _ in range(2):
        status, text = _status(
            two, nodes.pull_blocks, BlocksCacheKey(1), "blocks", [1], [1], notify=bytes(9000)
        )
        assert status == "LLM_PARAM_INVALID"
        assert "notify has 9000 bytes" in text
        assert two.do(_block, 1) == 0
        two.do(nodes.pull_blocks, BlocksCacheKey(1), "blocks", [2], [2])


# -- credits ---------------------------------------------------------------------------------


def _fill_up(one: Node, two: Node) -> None:
    """Until two has as many messages of one as it takes."""
    assert one.do(_send, 2, b"waits", WINDOW) == WINDOW
    assert two.do(_waiting, WINDOW)


def test_who_does_not_take_its_messages_holds_up_its_senders_alone(pair: tuple[Node, Node]) -> None:
    one, two = pair
    _fill_up(one, two)
    status, text = _status(one, _send, 2, b"more", timeout_in_millis=50)
    assert status == "LLM_TIMEOUT"
    assert "timeout_in_millis (0.05 s)" in text
    assert "has to call messages()" in text
    status, text = _status(
        one, nodes.pull_blocks, BlocksCacheKey(2), "blocks", [0], [1], notify=b"n",
        timeout_in_millis=2000,  # most of it is left when the data is there
    )  # fmt: skip
    assert (status, "the data is in place" in text) == ("LLM_TIMEOUT", True)
    one.do(nodes.pull_blocks, BlocksCacheKey(2), "blocks", [0], [1])  # transfers go on
    two.do(_send, 1, b"the other way")
    assert one.do(_take, 1) == [(2, b"the other way")]
    one.begin(_send, 2, b"last", timeout_in_millis=60_000)
    assert two.do(_take, WINDOW + 1) == [(1, b"waits")] * WINDOW + [(1, b"last")]
    one.result()


def test_a_stopped_receiver_is_waited_for_and_another_is_not(start_node: Start) -> None:
    one, two, three = (start_node(cluster) for cluster in (1, 2, 3))
    for cluster, node in ((2, two), (3, three)):
        name, mapping = f"with {cluster}", {1: 0, cluster: 1}
        one.begin(nodes.link_and_wait, name, mapping)
        node.do(nodes.link_and_wait, name, mapping)
        one.result()
        one.do(_send, cluster, b"hello")
    two.pause()
    assert one.do(_send, 2, b"x", WINDOW // 2) == WINDOW // 2
    assert _status(one, _send, 2, b"x", WINDOW, timeout_in_millis=50)[0] == "LLM_TIMEOUT"
    assert one.do(_send, 3, b"x", WINDOW // 2) == WINDOW // 2
    two.resume()
    assert two.do(_take, WINDOW)[0] == (1, b"hello")


def _wait_for_credit(here: nodes.Here) -> None:
    """Begin to send on threads of their own; they wait."""
    outcomes = here.any["outcomes"] = []

    def send() -> None:
        try:
            here.live.send_message(2, b"waits", timeout_in_millis=600_000)
        except Exception as error:
            outcomes.append(getattr(error, "status_code", error))

    here.any["threads"] = [threading.Thread(target=send, daemon=True) for _ in range(3)]
    for thread in here.any["threads"]:
        thread.start()
    (window,) = here.live._engine.notices._windows.values()  # type: ignore[union-attr]
    deadline = time.monotonic() + SECONDS
    while len(window.credits.line) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)


def _outcomes(here: nodes.Here) -> list[str]:
    for thread in here.any["threads"]:
        thread.join(SECONDS)
    return [getattr(code, "name", str(code)) for code in here.any["outcomes"]]


@pytest.mark.parametrize("end", ["killed", "finalize", "finalize there", "unlink", "unlink there"])
def test_who_waits_for_a_credit_hears_of_the_end(unlinked: tuple[Node, Node], end: str) -> None:
    one, two = unlinked
    ids = nodes.link_pair(one, two)
    _fill_up(one, two)
    one.do(_wait_for_credit)
    if end.startswith("unlink"):
        node, comm_id = (one, ids[0]) if end == "unlink" else (two, ids[1])
        node.do(nodes.unlink, comm_id)
        expected = "LLM_NOT_YET_LINK"
    elif end == "killed":
        two.kill()
        expected = "LLM_NOT_YET_LINK"
    elif end == "finalize":
        one.do(nodes.finalize)
        expected = "LLM_ENGINE_FINALIZED"
    else:
        two.do(nodes.finalize)
        expected = "LLM_NOT_YET_LINK"
    assert one.do(_outcomes) == [expected] * 3


def _hold_sessions(here: nodes.Here) -> None:
    """Keep the connections, whatever becomes of the links."""
    engine: Any = here.live._engine
    for view in engine.views.values():
        engine._call(lambda view=view: engine._discovery.hold(view.session, "a test"))


def test_messages_go_on_after_a_new_link_over_the_same_connection(
    unlinked: tuple[Node, Node],
) -> None:
    one, two = unlinked
    ids = nodes.link_pair(one, two)
    one.do(_hold_sessions)
    _fill_up(one, two)
    one.do(_wait_for_credit)
    one.do(nodes.unlink, ids[0])
    assert one.do(_outcomes) == ["LLM_NOT_YET_LINK"] * 3
    nodes.link_pair(one, two, "again")
    one.begin(_send_numbers, 2, range(3 * WINDOW))
    taken = two.do(_take, 4 * WINDOW)
    one.result()
    numbers = [int.from_bytes(data, "big") for _, data in taken[WINDOW:]]
    assert numbers == list(range(3 * WINDOW))


def test_messages_outlive_the_sender_and_the_link(
    pair: tuple[Node, Node], start_node: Start
) -> None:
    one, two = pair
    one.do(_send, 2, b"before the end", 3)
    assert two.do(_waiting, 3)
    one.kill()
    again = start_node(1, enable_remote_cache_accessible=True)
    mapping = {1: 0, 2: 1}
    again.begin(nodes.link_and_wait, "again", mapping)
    two.do(nodes.link_and_wait, "again", mapping)
    again.result()
    assert again.do(_send, 2, b"after", WINDOW - 3) == WINDOW - 3
    assert _status(again, _send, 2, b"x", timeout_in_millis=50)[0] == "LLM_TIMEOUT"
    assert two.do(_take, WINDOW) == [(1, b"before the end")] * 3 + [(1, b"after")] * (WINDOW - 3)
    again.do(_send, 2, b"goes on")
    assert two.do(_take, 1) == [(1, b"goes on")]


def _credits_lost(here: nodes.Here, count: int) -> None:
    """As by calls that a handler of a signal has interrupted."""
    (window,) = here.live._engine.notices._windows.values()  # type: ignore[union-attr]
    for _ in range(count):
        window.credits.take([], 1.0)


def test_credits_that_were_lost_come_back(pair: tuple[Node, Node]) -> None:
    one, two = pair
    one.do(_send, 2, b"first")
    one.do(_credits_lost, WINDOW - 1)
    assert one.do(_send, 2, b"x", WINDOW - 1, timeout_in_millis=60_000) == WINDOW - 1
    assert len(two.do(_take, WINDOW)) == WINDOW


def test_two_links_share_credits_and_the_inbox(pair: tuple[Node, Node]) -> None:
    one, two = pair
    _fill_up(one, two)
    nodes.link_pair(one, two, "second")
    assert _status(one, _send, 2, b"x", timeout_in_millis=50)[0] == "LLM_TIMEOUT"
    assert len(two.do(_take, WINDOW)) == WINDOW


def _ask_in_vain(here: nodes.Here) -> int:
    """Send where there is no room, again and again; how often the peer was asked for some."""
    (view,) = here.live._engine.views.values()  # type: ignore[union-attr]
    sent: list[Any] = []
    view.send = sent.append  # type: ignore[method-assign]
    for _ in range(50):
        with pytest.raises(LLMException):
            here.live.send_message(2, b"x", timeout_in_millis=1)
    del view.send
    for message in sent:
        view.send(message)
    return len(sent)


def test_who_tries_again_and_again_asks_once(pair: tuple[Node, Node]) -> None:
    one, two = pair
    _fill_up(one, two)
    assert one.do(_ask_in_vain) == 1
    assert len(two.do(_take, WINDOW)) == WINDOW
    one.do(_send, 2, b"goes on", timeout_in_millis=60_000)


def _send_from_many(here: nodes.Here) -> int:
    """Threads that have a credit each, and are held before they send; then two that have none.

    How many credits came meanwhile.
    """
    engine: Any = here.live._engine
    (view,) = engine.views.values()
    go, held = threading.Event(), threading.Semaphore(0)
    original = view.send

    def send(message: Any) -> None:
        if isinstance(message, Notice):
            held.release()
            assert go.wait(SECONDS)
        original(message)

    view.send = send
    (window,) = engine.notices._windows.values()
    before, threads = window.issued, []

    def begin() -> None:
        threads.append(threading.Thread(target=_send, args=(here, 2, b"x")))
        threads[-1].start()

    while window.credits.free:
        begin()
        assert held.acquire(timeout=SECONDS)
    for _ in range(2):
        begin()  # one for the place of a message that was taken
    while not window.credits.line and window.issued - before <= 1:
        time.sleep(0.005)
    assert view.synchronize(SECONDS)  # the peer has answered what was asked
    came = window.issued - before
    go.set()
    for thread in threads:
        thread.join()
    return int(came)


def test_credits_of_threads_that_are_about_to_send_are_not_lost_ones(
    pair: tuple[Node, Node],
) -> None:
    one, two = pair
    one.do(_send, 2, b"first")
    assert len(two.do(_take, 1)) == 1
    one.begin(_send_from_many)
    taken = two.do(_take, WINDOW + 1)
    assert one.result() == 1
    assert len(taken) == WINDOW + 1


def _messages_interrupted(here: nodes.Here) -> list[str]:
    """Take three messages, interrupted at one moment after another; where some were lost."""
    notices: Any = here.live._engine.notices  # type: ignore[union-attr]

    def prepare() -> list[ReceivedMessage]:
        notices.inbox.take()
        for number in range(3):
            notices.inbox.put(ReceivedMessage(1, bytes([number])))
        notices._asked = True
        return []

    def take(found: list[ReceivedMessage]) -> None:
        found += notices.take()

    return [
        where
        for where, found in interrupts.raising_anew(prepare, take)
        if len(found) + len(notices.inbox) != 3
    ]


def test_an_interrupted_call_loses_no_message(pair: tuple[Node, Node]) -> None:
    assert pair[0].do(_messages_interrupted) == []


def _interrupted(here: nodes.Here, cluster: int) -> int:
    """Send, interrupted at one moment after another; then in peace."""
    rounds = 0
    for _ in interrupts.raising(lambda: here.live.send_message(cluster, b"x"), step=4):
        rounds += 1
    for _ in range(2 * WINDOW):
        here.live.send_message(cluster, b"whole", timeout_in_millis=60_000)
    return rounds


def test_interrupted_calls_cost_no_credit_in_the_end(pair: tuple[Node, Node]) -> None:
    one, two = pair
    one.begin(_interrupted, 2)
    seen = 0
    while seen < 2 * WINDOW:
        seen += sum(data == b"whole" for _, data in two.do(_take, 1))
    assert one.result(120) > 10
    two.do(_send, 1, b"back")
    assert one.do(_take, 1) == [(2, b"back")]


@hosts.needed
def test_between_hosts(start_on: Start, net: Network) -> None:
    one, two = start_on(0, 1), start_on(1, 2)
    table = hosts.table([host.ipv4 for host in net.hosts[:2]])
    ids = [node.do(nodes.link, "pair", PAIR, table) for node in (one, two)]
    hosts.wait_all([one, two], ids)
    count = 3 * WINDOW
    one.begin(_send_numbers, 2, range(count))
    taken = two.do(_take, count)
    one.result()
    assert [int.from_bytes(data, "big") for _, data in taken] == list(range(count))
    two.kill()
    more = 2 * WINDOW  # than one may send before it is known that the other one has gone
    assert _status(one, _send, 2, b"x", more, timeout_in_millis=60_000)[0] == "LLM_NOT_YET_LINK"


# -- hostile senders -------------------------------------------------------------------------


def _linked(engine: Engine) -> RawPeer:
    raw_peer = engine.raw_peer()
    comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    assert link(raw_peer, "pair", PAIR, TABLE, offer_of(), [memory(SIZE)])
    engine.api.wait_link(comm_id)
    return raw_peer


def test_a_sender_without_credit_loses_its_session(engine: Engine) -> None:
    raw_peer = _linked(engine)
    raw_peer.say(Notice(data=b"too early"))
    assert engine.ended("messages sent without a credit")
    assert engine.api.messages() == []
    engine.works()


def test_credits_that_are_claimed_to_be_lost_do_not_fill_the_memory(engine: Engine) -> None:
    """Not even of who says that it has used what it has."""
    raw_peer = _linked(engine)
    for _ in range(10):
        raw_peer.say(AskRoom(used=1 << 63))
    while raw_peer.say(Notice(data=bytes(MAX_BYTES))):
        pass
    assert engine.ended("messages that the program has not taken, more than 128")
    assert len(engine.api.messages()) == 2 * WINDOW
    engine.works()


def test_a_message_that_is_too_large_ends_the_session_of_its_sender(engine: Engine) -> None:
    raw_peer = _linked(engine)
    raw_peer.say(AskRoom(used=0))
    assert raw_peer.hear("room") is not None
    size = MAX_BYTES + 2
    raw_peer.send(size.to_bytes(4, "big") + bytes(size))
    assert engine.ended(f"a message of {MAX_BYTES + 1} bytes is larger than {MAX_BYTES}")
    engine.works()


def test_who_is_not_linked_gets_no_credit(engine: Engine) -> None:
    raw_peer = engine.raw_peer()
    assert raw_peer.hear("hello") is not None
    raw_peer.say(AskRoom(used=0))
    raw_peer.say({"kind": "sync", "id": 3})
    assert raw_peer.hear("synced") is not None
    assert [message.kind for message in raw_peer.heard() if message.kind == "room"] == []


def test_a_pull_that_consumes_its_key_tells_the_owner(start_node: Start) -> None:
    one, two = start_node(1), start_node(2)
    one.do(nodes.make, "slots", "cache", [1, 64], 2, [CacheKey(1, 5)])
    two.do(nodes.make, "slots", "cache", [1, 64], 2)
    nodes.link_pair(one, two)
    two.do(nodes.pull_cache, CacheKey(1, 5), "slots", notify=b"request 5")
    assert one.do(_take, 1) == [(2, b"request 5")]
