"""Pulls of grants with a time limit and a message for the owner, and in the background."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any

import pytest

from datadist import BlocksCacheKey, CacheKey, LLMStatusCode, TransferTask
from tests import background, held, nodes
from tests.grants import world as grants
from tests.grants.world import GONE, Start, check, linked
from tests.nodes import Here, Node, RemoteError

FAR = 600_000
"""ms of a time limit that no test reaches."""
SHORT = 300
"""ms that are over before anything else happens."""
ROOM = 2000
"""ms that are over after the data was read."""
MODES = pytest.mark.parametrize("one_sided", [False, True])


def _pair(start: Start, one_sided: bool, **settings: Any) -> tuple[Node, Node]:
    settings = {"sync_kv_timeout": FAR, **settings}
    owner, reader = linked(start, enable_remote_cache_accessible=one_sided, **settings)
    return owner, reader


def _outcome(here: Here, **options: Any) -> tuple[str, str]:
    """How a pull of a grant ended, and the text."""
    texts: list[str] = []

    def pull() -> None:
        try:
            grants.pull(here, **options)
        except Exception as error:
            texts.append(str(error))
            raise

    return background.outcome(pull), "".join(texts)


# -- messages --------------------------------------------------------------------------------


def _messages(here: Here, count: int) -> list[tuple[bytes, str]]:
    """So many messages, each the number of a request, with the state of its grant at that time."""
    found: list[tuple[bytes, str]] = []
    deadline = time.monotonic() + nodes.SECONDS
    while len(found) < count and time.monotonic() < deadline:
        select.select([here.live.messages_fileno()], [], [], 1)
        for message in here.live.messages():
            found.append((message.data, grants.state(here, int(message.data))))
    return found


def _pull_and_notify(here: Here, pulls: list[tuple[int, dict[str, Any]]]) -> None:
    for req, options in pulls:
        grants.pull(here, req=req, notify=str(req).encode(), **options)


def _pull_and_notify_later(here: Here, pulls: list[tuple[int, dict[str, Any]]]) -> None:
    pull = here.live.cache_manager.pull_blocks_async
    for req, options in pulls:
        target = options.pop("dst", [0, 1, 2, 3])
        place = {"src_blocks": options.pop("src", ()), "dst_blocks": target}
        pull(
            CacheKey(1, req), here.caches["dst"], notify=str(req).encode(), **place, **options
        ).result(nodes.SECONDS)


@MODES
@pytest.mark.parametrize("call", [_pull_and_notify, _pull_and_notify_later])
def test_the_owner_knows_who_has_finished_when_the_message_comes(
    start_node: Start, one_sided: bool, call: Callable[..., None]
) -> None:
    owner, reader = _pair(start_node, one_sided)
    pulls: list[tuple[int, dict[str, Any]]] = []
    for req in range(40):
        token = owner.do(grants.grant, req=req)
        pulls.append((req, {"token": token} if req % 2 else {}))
    for req, options in ((40, {"release": True}), (41, {})):
        owner.do(grants.grant, req=req)
        pulls.append((req, {"src": [1, 3], "dst": [0, 1], **options}))
    reader.begin(call, pulls)
    expected = [(str(req).encode(), "CONSUMED") for req in range(41)] + [(b"41", "GRANTED")]
    assert owner.do(_messages, 42) == expected
    reader.result()
    check(reader, [2, 30, 9, 30], [0, 1, 2, 3])


@MODES
def test_a_pull_that_fails_sends_no_message(start_node: Start, one_sided: bool) -> None:
    owner, reader = _pair(start_node, one_sided)
    tokens = [owner.do(grants.grant, req=req) for req in (1, 2)]
    owner.do(grants.revoke, 1)
    for token in (None, tokens[0]):
        assert reader.do(_outcome, req=1, token=token, notify=b"1")[0] == GONE
    reader.do(_pull_and_notify, [(2, {"token": tokens[1]})])
    assert owner.do(_messages, 1) == [(b"2", "CONSUMED")]


# -- in the background -----------------------------------------------------------------------


def _begin(
    here: Here,
    src: Any = (),
    dst: Any = (0, 1, 2, 3),
    req: int = 7,
    key: Any = None,
    **options: Any,
) -> TransferTask:
    return here.live.cache_manager.pull_blocks_async(
        key or CacheKey(1, req), here.caches["dst"], src, dst, **options
    )


def _run(here: Here, **options: Any) -> str:
    return background.code(_begin(here, **options))


def _refused(here: Here, **options: Any) -> str:
    """What the call itself raises."""
    return background.outcome(lambda: _begin(here, **options))


@MODES
def test_grants_are_pulled_in_the_background(start_node: Start, one_sided: bool) -> None:
    owner, reader = _pair(start_node, one_sided)
    token = owner.do(grants.grant)
    assert reader.do(_run, src=[2, 0], dst=[5, 6]) == "OK"
    assert owner.do(grants.state) == "GRANTED"
    assert reader.do(_run, token=token) == "OK"
    check(reader, [5, 2, 9, 30, 9, 5], [0, 1, 2, 3, 5, 6])
    assert owner.do(grants.wait) == "CONSUMED"
    for options in ({"token": token}, {"src": [0], "dst": [0]}, {"release": True}):
        assert reader.do(_run, **options) == GONE
    owner.do(grants.grant, req=8)
    assert reader.do(_run, req=8, src=[0], dst=[0], release=True) == "OK"
    assert owner.do(grants.wait, 8) == "CONSUMED"
    assert owner.do(grants.grant, req=9)
    assert reader.do(_run, req=9, src=[4], dst=[0]) == "LLM_PARAM_INVALID"
    assert owner.do(grants.state, 9) == "GRANTED"


@MODES
def test_wrong_arguments_are_raised_at_the_call(start_node: Start, one_sided: bool) -> None:
    owner, reader = _pair(start_node, one_sided)
    token = owner.do(grants.grant)
    for options in (
        {"token": token[:-1]},
        {"token": token, "req": 8},
        {"token": token, "src": [4], "dst": [0]},
        {"token": token, "src": [0, 1], "dst": [0]},
        {"token": token, "dst": [0, 1, 2]},
        {"token": token, "dst": [0, 1, 2, 2]},
        {"dst": [0, 1, 2, 99]},
        {"token": token, "src_layer_range": range(4, 5), "dst_layer_range": range(4, 5)},
        {"token": token, "key": BlocksCacheKey(1)},
        {"release": True, "key": BlocksCacheKey(1)},
        {"token": token, "timeout_in_millis": 0},
        {"token": token, "notify": bytes(8193)},
    ):
        assert reader.do(_refused, **options) == "LLM_PARAM_INVALID", options
    for other in ({"token": "text"}, {"release": 1}, {"token": token, "notify": "text"}):
        assert reader.do(_refused, **other) == "TypeError", other
    assert owner.do(grants.state) == "GRANTED"
    assert reader.do(_run, token=token) == "OK"
    assert owner.do(_messages, 0) == []


def _hold(here: Here, pulls: list[dict[str, Any]]) -> bool:
    """Begin pulls; whether as many are inside of the transport as may be."""
    here.any["tasks"] = [_begin(here, **options) for options in pulls]
    return held.inside(here, min(4, len(pulls)))


def _cancel(here: Here) -> list[bool]:
    return [task.cancel() for task in here.any["tasks"]]


@MODES
def test_who_is_cancelled_has_not_finished(start_node: Start, one_sided: bool) -> None:
    """Before it began, or in it: then it ends well, or with an error that is not about the grant."""
    owner, reader = _pair(start_node, one_sided)
    pulls = []
    for req in range(6):
        token = owner.do(grants.grant, req=req)
        pulls.append({"req": req, "token": token, "release": True})
    reader.do(held.hold_moves, 1)
    assert reader.do(_hold, pulls)
    assert reader.do(_cancel) == [False] * 4 + [True] * 2
    reader.do(held.hold_no_more)
    reader.do(held.let_go)
    assert reader.do(background.codes) == ["OK"] * 4 + ["LLM_FAILED"] * 2
    for req in range(4):
        assert owner.do(grants.wait, req) == "CONSUMED"
    for req in (4, 5):
        assert owner.do(grants.state, req) == "GRANTED"
        assert reader.do(_run, **pulls[req]) == "OK"
        assert owner.do(grants.wait, req) == "CONSUMED"


def _large(here: Here, label: str) -> None:
    nodes.make(here, label, "blocks", [8, 1 << 19], 1)
    nodes.fill(here, label, 3)


def _cancel_in_pieces(here: Here, token: bytes) -> tuple[str, str]:
    """Cancel while the first piece is read."""
    link: Any = held.attempt_with(here, 1).link
    inner, tasks = link.read, list[TransferTask]()

    def read(*args: Any) -> Any:
        while not tasks:
            time.sleep(0.001)
        tasks[0].cancel()
        return inner(*args)

    link.read = read
    tasks.append(
        here.live.cache_manager.pull_blocks_async(
            CacheKey(1, 7), here.caches["large"], (), list(range(8)), token=token, release=True
        )
    )
    code = background.code(tasks[0])
    link.read = inner
    return code, str(tasks[0]._job.error())


@MODES
def test_who_is_cancelled_between_pieces_has_not_finished(
    start_node: Start, one_sided: bool
) -> None:
    owner, reader = (
        start_node(number, pool=40 * nodes.MIB, enable_remote_cache_accessible=one_sided)
        for number in (1, 2)
    )
    for node in (owner, reader):
        node.do(_large, "large")
    grants.link(owner, reader)
    token = owner.do(grants.grant, list(range(8)), label="large")
    code, text = reader.do(_cancel_in_pieces, token)
    assert code == "LLM_FAILED"
    assert "cancelled" in text
    assert owner.do(grants.state) == "GRANTED"


# -- time limits -----------------------------------------------------------------------------


@MODES
def test_a_question_has_the_time_of_its_call(start_node: Start, one_sided: bool) -> None:
    owner, reader = _pair(start_node, one_sided)
    owner.do(grants.grant)
    owner.pause()
    try:
        status, text = reader.do(_outcome, timeout_in_millis=SHORT)
        assert status == "LLM_TIMEOUT"
        assert "timeout_in_millis" in text
        status = reader.do(_run, timeout_in_millis=SHORT)
        assert status == "LLM_TIMEOUT"
    finally:
        owner.resume()
    reader.do(grants.pull)
    check(reader)


def test_a_call_may_take_longer_than_others(start_node: Start) -> None:
    owner, reader = _pair(start_node, False, sync_kv_timeout=1)
    owner.do(grants.grant)
    owner.pause()
    reader.begin(grants.pull, timeout_in_millis=FAR)
    time.sleep(0.3)  # far longer than sync_kv_timeout
    owner.resume()
    reader.result()
    check(reader)


@MODES
def test_the_question_after_the_read_has_what_is_left(start_node: Start, one_sided: bool) -> None:
    """Over a link that does not reach the words."""
    settings = {"enable_remote_cache_accessible": one_sided, "sync_kv_timeout": FAR}
    owner, reader = (start_node(number, **settings) for number in (1, 2))
    grants.link(owner, reader)
    grants.prepare(owner, reader)
    token = owner.do(grants.grant)
    reader.do(grants.pull, [9], [0])  # the link is warm, and the cache known
    owner.pause()
    try:
        status, text = reader.do(_outcome, token=token, timeout_in_millis=ROOM)
        assert status == "LLM_TIMEOUT"
        assert "timeout_in_millis" in text
        assert "whether the grant lives" in text
    finally:
        owner.resume()
    assert reader.do(_outcome, token=token, timeout_in_millis=FAR)[0] == "OK"
    assert owner.do(grants.wait) == "CONSUMED"


def _pull_late(here: Here, **options: Any) -> tuple[str, str, int]:
    """A pull whose data comes after its time; reads of the link."""
    link: Any = held.attempt_with(here, 1).link
    inner, reads = link.read, list[int]()

    def read(*args: Any) -> Any:
        result = inner(*args)
        if not reads:
            time.sleep(1.5 * ROOM / 1000)
        reads.append(1)
        return result

    link.read = read
    try:
        return (*_outcome(here, timeout_in_millis=ROOM, **options), len(reads))
    finally:
        link.read = inner


@MODES
@pytest.mark.parametrize("ends", [False, True])
def test_the_word_has_what_the_data_has_left(
    start_node: Start, one_sided: bool, ends: bool
) -> None:
    owner, reader = _pair(start_node, one_sided)
    token = owner.do(grants.grant)
    reader.do(grants.pull, [9], [0])
    reader.begin(_pull_late, token=token)
    status, text, reads = reader.result()
    assert (status, reads) == ("LLM_TIMEOUT", 1), text
    assert "no time is left" in text
    if ends:
        owner.do(grants.revoke)
    else:
        assert owner.do(grants.state) == "GRANTED"
    assert reader.do(_outcome, token=token)[0] == (GONE if ends else "OK")


def _before_its_news(here: Here, token: bytes) -> str:
    """A pull by a token before the owner has told of the cache, which does not answer."""
    engine = here.live._live(LLMStatusCode.LLM_FAILED)
    (view,) = engine.views.values()
    with view.lock:
        entries, view.directory.entries = view.directory.entries, {}
    try:
        return _outcome(here, token=token, timeout_in_millis=SHORT)[0]
    finally:
        with view.lock:
            view.directory.entries = entries


def test_no_answer_is_no_statement_about_the_grant(start_node: Start) -> None:
    owner, reader = _pair(start_node, False)
    token = owner.do(grants.grant)
    owner.pause()
    try:
        assert reader.do(_before_its_news, token) == "LLM_TIMEOUT"
    finally:
        owner.resume()
    reader.do(grants.pull, token=token)
    check(reader)


def test_a_cache_is_pulled_by_its_key_with_all_of_this(start_node: Start) -> None:
    """A key of a linked cluster may name a grant, and names a cache here."""
    owner, reader = (start_node(number) for number in (1, 2))
    owner.do(nodes.make, "slots", "cache", [1, 4 * grants.WIDTH], 2, [CacheKey(1, 7)])
    owner.do(nodes.fill, "slots", 1)
    reader.do(nodes.make, "dst", "blocks", [8, grants.WIDTH], 2)
    grants.link(owner, reader)
    with pytest.raises(RemoteError) as caught:
        reader.do(grants.pull, release=True, timeout_in_millis=FAR)
    assert caught.value.status == "LLM_PARAM_INVALID"
    assert reader.do(_run, notify=b"there", timeout_in_millis=FAR) == "OK"
    assert owner.do(_first_message) == b"there"
    for tensor, array in enumerate(reader.do(nodes.read, "dst")):
        whole = nodes.pattern(1, tensor, (1, 4 * grants.WIDTH))
        assert (array[:4].ravel() == whole.ravel()).all()


def _first_message(here: Here) -> bytes:
    select.select([here.live.messages_fileno()], [], [], nodes.SECONDS)
    (message,) = here.live.messages()
    return message.data
