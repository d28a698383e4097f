"""Registered memory whose pages do not come: calls end, memory is kept, and other transfers go on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from datadist import BlocksCacheKey, CacheDesc, DataType, LLMException
from tests import held, missing, nodes
from tests.nodes import Node, RemoteError
from tests.waiting import until

Start = Callable[..., Node]
PAGES, BLOCK = 64, missing.PAGE
KEY = BlocksCacheKey(1)
SECONDS = 1.0
SHORT: dict[str, Any] = {"timeout_in_millis": int(SECONDS * 1000)}
WHOLE: dict[str, Any] = {}
"""Limits of calls that are to time out, and of those that are to succeed, which have a minute."""
FAR = 30.0
"""No end that is awaited comes so late, however busy the machine."""


@pytest.fixture(autouse=True)
def _possible() -> None:
    missing.skip_unless_possible()


def _register_missing(here: nodes.Here, key: Any = None, come: int = 0) -> int:
    """Register pages of which the first ``come`` are there, as blocks."""
    memory = here.any["missing"] = missing.Missing(PAGES)
    if come:
        memory.come(7, 0, come)
    desc = CacheDesc(1, [PAGES, BLOCK], DataType.DT_UINT8)
    cache = here.live.cache_manager.register_blocks_cache(
        desc, [memory.address], *([] if key is None else [key])
    )
    here.caches["missing"] = cache
    return cache.cache_id


def _come(here: nodes.Here, value: int, first: int = 0, count: int | None = None) -> None:
    here.any["missing"].come(value, first, count)


def _allocate(here: nodes.Here, label: str, key: Any = None, blocks: int = PAGES) -> None:
    desc = CacheDesc(1, [blocks, BLOCK], DataType.DT_UINT8)
    cache = here.live.cache_manager.allocate_blocks_cache(desc, key)
    here.caches[label] = cache
    cache.numpy()[0][:] = 1 if key is None else 9


def _free(here: nodes.Here, label: str) -> None:
    here.live.cache_manager.deallocate_blocks_cache(here.caches[label])


def _pull(
    here: nodes.Here, label: str, blocks: list[int], key: Any = KEY, limit: dict[str, Any] = WHOLE
) -> tuple[str, float]:
    """How a pull ended, and after how many seconds."""
    started = time.monotonic()
    try:
        here.live.cache_manager.pull_blocks(key, here.caches[label], blocks, blocks, **limit)
    except Exception as error:
        code = getattr(error, "status_code", None)
        return f"{'' if code is None else code.name}: {error}", time.monotonic() - started
    return "done", time.monotonic() - started


def _first(here: nodes.Here, label: str, block: int) -> int:
    return int(here.caches[label].numpy()[0][block, 0])


def _used(here: nodes.Here) -> int:
    used: int = here.live.stats()["pools"]["DEVICE"]["pages_used"]
    return used


def _timed(here: nodes.Here, act: Callable[..., None], *args: Any) -> float:
    started = time.monotonic()
    act(here, *args)
    return time.monotonic() - started


def _is_zero(number: int) -> bool:
    return number == 0


def _until(node: Node, act: Callable[..., Any], wanted: Callable[[Any], bool]) -> None:
    deadline = time.monotonic() + FAR
    while not wanted(found := node.do(act)):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def _pair(start_node: Start, **settings: Any) -> tuple[Node, Node]:
    return start_node(1), start_node(2, **{"sync_kv_timeout": 60_000, **settings})


@pytest.mark.parametrize("blocks", [[0], list(range(PAGES))], ids=["small", "large"])
def test_a_pull_from_pages_that_do_not_come_ends_at_its_deadline(
    start_node: Start, blocks: list[int]
) -> None:
    owner, reader = _pair(start_node)
    owner.do(_register_missing, KEY)
    owner.do(_allocate, "others", BlocksCacheKey(1, 5))
    reader.do(_allocate, "mine")
    _, comm_id = nodes.link_pair(owner, reader)
    used = reader.do(_used)
    text, seconds = reader.do(_pull, "mine", blocks, limit=SHORT)
    assert text.startswith("LLM_TIMEOUT"), text
    assert "until it has settled" in text
    assert SECONDS <= seconds < FAR
    error = reader.do(nodes.link_error, comm_id)
    assert "has not let go" in error
    text, _ = reader.do(_pull, "mine", [PAGES - 1], BlocksCacheKey(1, 5))
    assert text == "done", "others go on"
    assert reader.do(_first, "mine", PAGES - 1) == 9
    reader.do(_free, "mine")
    assert reader.do(_used) == used, "the pages are used again"
    owner.do(_come, 7)
    _until(reader, _used, _is_zero)
    assert reader.do(nodes.link_error, comm_id) is None


class Interrupt(BaseException):
    """What the handler raises."""


def _pull_interrupted(here: nodes.Here, label: str, blocks: list[int]) -> str:
    """How a pull ended during whose wait a handler of a signal was to run, which raises."""

    def raising(_number: int, _frame: object) -> None:
        raise Interrupt

    signal.signal(signal.SIGALRM, raising)
    signal.setitimer(signal.ITIMER_REAL, SECONDS / 2)  # while native code waits
    try:
        here.live.cache_manager.pull_blocks(KEY, here.caches[label], blocks, blocks, **SHORT)
    except Interrupt:
        return "interrupted"
    except Exception as error:
        return str(error)
    return "done"


@pytest.mark.parametrize("blocks", [[0], list(range(PAGES))], ids=["small", "large"])
@pytest.mark.parametrize("known", [False, True])
def test_what_an_interrupted_pull_has_left_is_kept_as_well(
    start_node: Start, blocks: list[int], known: bool
) -> None:
    owner, reader = _pair(start_node)
    owner.do(_register_missing, KEY, PAGES if known else 0)
    reader.do(_allocate, "mine")
    _, comm_id = nodes.link_pair(owner, reader)
    if known:
        assert reader.do(_pull, "mine", [1])[0] == "done"
        owner.do(_go, 0, len(blocks))
    used = reader.do(_used)
    assert reader.do(_pull_interrupted, "mine", blocks) == "interrupted"
    assert "has not let go" in reader.do(nodes.link_error, comm_id)
    reader.do(_free, "mine")
    assert reader.do(_used) == used, "the pages are used again"
    owner.do(_come, 7, 0, len(blocks))
    _until(reader, _used, _is_zero)


@pytest.mark.parametrize("blocks", [[0], list(range(PAGES))], ids=["small", "large"])
@pytest.mark.parametrize("from_pool", [True, False])
def test_a_pull_into_pages_that_do_not_come_ends_at_its_deadline(
    start_node: Start, blocks: list[int], from_pool: bool
) -> None:
    owner, reader = _pair(start_node)
    if from_pool:
        owner.do(_allocate, "theirs", KEY)
    else:
        owner.do(_register_missing, KEY, come=PAGES)
    reader.do(_register_missing)
    nodes.link_pair(owner, reader)
    text, seconds = reader.do(_pull, "missing", blocks, limit=SHORT)
    assert text.startswith("LLM_TIMEOUT"), text
    assert SECONDS <= seconds < FAR
    with pytest.raises(RemoteError, match="stays registered: a pull from cluster 1") as error:
        reader.do(_unregister)
    assert error.value.status == "LLM_FAILED"
    reader.do(_come, 3)
    _until(reader, _unregistered, bool)


def _unregister(here: nodes.Here) -> None:
    here.live.cache_manager.unregister_cache(here.caches["missing"].cache_id)


def _unregistered(here: nodes.Here) -> bool:
    try:
        _unregister(here)
    except LLMException as error:
        return "stays registered" not in str(error)
    return True


def test_a_pull_that_finds_its_pages_late_succeeds(start_node: Start) -> None:
    owner, reader = start_node(1), start_node(2, sync_kv_timeout=60_000)
    owner.do(_register_missing, KEY)
    reader.do(_allocate, "mine")
    nodes.link_pair(owner, reader)
    reader.begin(_pull, "mine", [1, 2])
    owner.do(_come, 7)
    text, _ = reader.result()
    assert text == "done"
    assert reader.do(_first, "mine", 2) == 7


@pytest.mark.parametrize("end", [nodes.unlink, nodes.finalize])
def test_neither_unlink_nor_finalize_waits_for_them(start_node: Start, end: Any) -> None:
    owner, reader = _pair(start_node, sync_kv_timeout=int(SECONDS * 1000))
    owner.do(_register_missing, KEY)
    reader.do(_allocate, "mine")
    _, comm_id = nodes.link_pair(owner, reader)
    text, _ = reader.do(_pull, "mine", [0], limit=SHORT)
    assert text.startswith("LLM_TIMEOUT"), text
    args = [comm_id] if end is nodes.unlink else []
    assert reader.do(_timed, end, *args) < 25, "it would wait as long as pages do not come"
    if end is nodes.finalize:
        nodes.said(reader, "ERROR", "has not let go")
    owner.do(_come, 7)
    assert reader.is_alive


@pytest.mark.parametrize("end", [nodes.unlink, nodes.finalize])
def test_a_call_that_waits_for_them_ends_with_the_link(start_node: Start, end: Any) -> None:
    owner, reader = start_node(1), start_node(2, sync_kv_timeout=3_000)
    owner.do(_register_missing, KEY)
    reader.do(_allocate, "mine")
    _, comm_id = nodes.link_pair(owner, reader)
    args = [comm_id] if end is nodes.unlink else []
    found = reader.do(_end_beside_a_pull, end, *args)
    assert found[0].startswith(("LLM_FAILED", "LLM_TIMEOUT", "LLM_NOT_YET_LINK")), found
    owner.do(_come, 7)


def _end_beside_a_pull(here: nodes.Here, end: Any, *args: Any) -> list[str]:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(_pull(here, "mine", [0])[0]))
    permits = held.permits_with(here, 1)
    thread.start()
    until(lambda: permits.taken > 0)
    end(here, *args)
    thread.join(FAR)
    return found


def test_the_end_of_the_owner_ends_it(start_node: Start) -> None:
    owner, reader = _pair(start_node)
    owner.do(_register_missing, KEY)
    reader.do(_allocate, "mine")
    nodes.link_pair(owner, reader)
    text, _ = reader.do(_pull, "mine", [0], limit=SHORT)
    assert text.startswith("LLM_TIMEOUT"), text
    reader.do(_free, "mine")
    owner.kill()
    _until(reader, _used, _is_zero)


@pytest.mark.parametrize("blocks", [[0], list(range(PAGES))], ids=["small", "large"])
def test_a_push_from_pages_that_do_not_come_ends_at_its_deadline(
    start_node: Start, blocks: list[int]
) -> None:
    target = start_node(1, enable_remote_cache_accessible=True)
    writer = start_node(2, enable_remote_cache_accessible=True, sync_kv_timeout=int(SECONDS * 1000))
    target.do(_allocate, "theirs", KEY)
    writer.do(_register_missing)
    nodes.link_pair(target, writer)
    text = writer.do(_push, blocks)
    assert text.startswith("LLM_TIMEOUT"), text
    target.do(_free, "theirs")
    assert target.do(_used) > 0, "the writer may still be writing"
    writer.do(_come, 3)
    _until(target, _used, _is_zero)


def _push(here: nodes.Here, blocks: list[int]) -> str:
    try:
        here.live.cache_manager.push_blocks(
            KEY, here.caches["missing"], blocks, blocks, range(1), range(1), 1
        )
    except Exception as error:
        code = getattr(error, "status_code", None)
        return f"{'' if code is None else code.name}: {error}"
    return "done"


def _go(here: nodes.Here, page: int, count: int = 1) -> None:
    """Take pages away, and let the moment pass for which they count as seen (17 ms)."""
    here.any["missing"].go(page, count)
    time.sleep(0.1)


@pytest.mark.parametrize("ours", [False, True])
def test_a_page_that_went_after_a_pull_is_missed(start_node: Start, ours: bool) -> None:
    owner, reader = _pair(start_node)
    owner.do(_register_missing, KEY, PAGES)
    reader.do(_register_missing, None, PAGES)
    nodes.link_pair(owner, reader)
    for _ in range(3):
        assert reader.do(_pull, "missing", [0, 5])[0] == "done"
    end = reader if ours else owner
    end.do(_go, 5)
    assert reader.do(_pull, "missing", [0])[0] == "done"
    text, seconds = reader.do(_pull, "missing", [5], limit=SHORT)
    assert text.startswith("LLM_TIMEOUT"), text
    assert SECONDS <= seconds < FAR
    end.do(_come, 3, 5, 1)
    _until(reader, _pull_again, _is_done)


def _pull_again(here: nodes.Here) -> str:
    return _pull(here, "missing", [5])[0]


def _is_done(text: str) -> bool:
    return text == "done"
