"""The same grants over every kind of transport, and where the words are not reached."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from datadist.grants.messages import GrantMessages
from datadist.grants.words import SCRATCH, Words
from datadist.status import LLMException, LLMStatusCode
from datadist.transport import TransferTimeout
from tests import nodes, waiting
from tests.grants import world as grants
from tests.grants.world import GONE, Start, check, failed, linked
from tests.nodes import Here, Node

OWNER_MOVES = "tests.socket_transport:SocketTransport"
"""The owner's threads move the bytes."""
ORDERED = "tests.lingering_transports:LingeringTransport"
"""A read may have the word as its last segment."""
REFERENCE = "datadist.testing.reference:ReferenceTransport"


def _watch(here: Here) -> None:
    """Count the questions after reads, and the reads of the transport."""
    engine = here.live._engine
    assert engine is not None
    kind: Any = type(engine._all_domains()[0].attempt.link)  # type: ignore[union-attr]
    counts = here.any["counts"] = {"questions": 0, "reads": 0}

    def counting(owner: type, name: str, what: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            counts[what] += 1
            return inner(*args, **options)

        setattr(owner, name, call)

    counting(GrantMessages, "is_live", "questions")
    counting(kind, "read", "reads")


def _counts(here: Here) -> dict[str, int]:
    found: dict[str, int] = here.any["counts"]
    return found


def _exercise(owner: Node, reader: Node, questions: int, reads: int) -> None:
    """A grant that is read, one that has ended, and what each pull cost."""
    owner.do(grants.grant)
    reader.do(_watch)
    reader.do(grants.pull)
    assert reader.do(_counts) == {"questions": questions, "reads": reads}
    check(reader)
    assert owner.do(grants.wait) == "CONSUMED"
    token = owner.do(grants.grant, req=8)
    reader.do(grants.pull, [0], [0], 8)
    owner.do(grants.revoke, 8)
    owner.do(grants.reuse)
    assert failed(reader, req=8) == failed(reader, req=8, token=token) == GONE


@pytest.mark.parametrize(
    ("backend", "reads"), [(OWNER_MOVES, 2), (ORDERED, 1), (REFERENCE, 2), ("shm", 2)]
)
@pytest.mark.parametrize("memory", ["pool", "numpy"])
def test_grants(start_node: Start, backend: str, reads: int, memory: str) -> None:
    owner, reader = linked(start_node, memory=memory, transfer_backend=backend)
    _exercise(owner, reader, 0, reads)


@pytest.mark.parametrize("backend", ["shm", OWNER_MOVES, ORDERED])
def test_a_link_that_does_not_reach_the_words(start_node: Start, backend: str) -> None:
    """It was made before there was a blocks cache: a question to the owner takes the word's place."""
    owner, reader = (start_node(cluster, transfer_backend=backend) for cluster in (1, 2))
    grants.link(owner, reader)
    grants.prepare(owner, reader)
    _exercise(owner, reader, 1, 1)
    for node in (owner, reader):
        node.do(nodes.unlink, 1)
    grants.link(owner, reader, name="again")  # which reaches them
    owner.do(nodes.fill, "src", 1)
    owner.do(grants.grant, req=9)
    before = reader.do(_counts)["questions"]
    reader.do(grants.pull, req=9)
    assert reader.do(_counts)["questions"] == before


def _without_page(here: Here) -> None:
    def refuse(*args: object) -> None:
        raise LLMException("no memory", status_code=LLMStatusCode.LLM_OUT_OF_MEMORY)

    engine = here.live._engine
    assert engine is not None
    engine.memory.add_region = refuse  # type: ignore[method-assign,assignment]


def test_an_engine_without_memory_for_words(start_node: Start) -> None:
    owner, reader = start_node(1), start_node(2)
    for node in (owner, reader):
        node.do(_without_page)
    grants.prepare(owner, reader)
    grants.link(owner, reader)
    (warning,) = owner.do(nodes.log_of, "WARNING there is no page")
    assert "no memory" in warning
    _exercise(owner, reader, 1, 1)


def test_checksums_are_compared_of_granted_blocks_too(start_node: Start) -> None:
    owner, reader = (start_node(cluster) for cluster in (1, 2))
    for cluster, node in ((1, owner), (2, reader)):
        node.do(nodes.finalize)
        node.do(_init_with_checksums, cluster)
    grants.prepare(owner, reader)
    grants.link(owner, reader)
    owner.do(grants.grant)
    reader.do(grants.pull)
    check(reader)


def _init_with_checksums(here: Here, cluster: int) -> None:
    here.engine = type(here.live)(here.live._role, cluster)
    here.live.init({**here.any["options"], "datadist.checksum": "1"})


def test_all_words_are_read_into_at_once(start_node: Start) -> None:
    """One pull more asks the owner."""
    owner, reader = linked(start_node)
    owner.do(grants.grant)
    reader.do(_watch)
    reader.do(_take_all_scratch)
    reader.do(grants.pull)
    check(reader)
    assert reader.do(_counts) == {"questions": 1, "reads": 1}


def _take_all_scratch(here: Here) -> None:
    engine = here.live._engine
    assert engine is not None
    assert isinstance(engine.words, Words)
    engine.words._scratch.clear()


def _fail_and_count_scratch(here: Here) -> int:
    """How many scratch words are missing after pulls that failed in every way."""
    engine = here.live._engine
    assert engine is not None
    before = len(engine.words._scratch)
    kind: Any = type(engine._all_domains()[0].attempt.link)  # type: ignore[union-attr]
    for error in (KeyboardInterrupt(), RuntimeError("a defect"), TimeoutError()):
        with (
            mock.patch.object(kind, "read", side_effect=error),
            pytest.raises((KeyboardInterrupt, LLMException, TimeoutError)),
        ):
            grants.pull(here)
    return before - len(engine.words._scratch)


def test_pulls_that_fail_keep_no_word(start_node: Start) -> None:
    owner, reader = linked(start_node)
    owner.do(grants.grant)
    assert reader.do(_fail_and_count_scratch) == 0
    reader.do(grants.pull)
    check(reader)


def _leave_word_in_flight(here: Here) -> tuple[str, int]:
    """A pull whose read of the word times out and goes on; its status, and the words that are kept."""
    engine = here.live._engine
    assert engine is not None
    before = len(engine.words._scratch)
    kind: Any = type(engine._all_domains()[0].attempt.link)  # type: ignore[union-attr]
    inner, reads = kind.read, []
    late = TransferTimeout("not complete", link_usable=True)
    late.in_flight = SimpleNamespace(settled=lambda: "settled" in here.any)

    def read(*args: Any, **options: Any) -> Any:
        reads.append(1)
        if len(reads) == 2:
            raise late
        return inner(*args, **options)

    with mock.patch.object(kind, "read", read), pytest.raises(LLMException) as caught:
        grants.pull(here)
    return caught.value.status_code.name, before - len(engine.words._scratch)


def _settle_word(here: Here) -> None:
    """The word can be read into again once its read has settled."""
    here.any["settled"] = True
    engine = here.live._engine
    assert engine is not None
    words = engine.words
    waiting.until(lambda: len(words._scratch) == SCRATCH)


def test_a_word_that_is_still_read_into_is_not_used_again(start_node: Start) -> None:
    owner, reader = linked(start_node)
    owner.do(grants.grant)
    assert reader.do(_leave_word_in_flight) == ("LLM_TIMEOUT", 1)
    reader.do(grants.pull)
    check(reader)
    reader.do(_settle_word)
