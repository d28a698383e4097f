"""The handshake and the frames of the authenticated channel; no sockets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.control.channel import GREETING, Handshake, HandshakeError, Seal

KEYS = st.binary(min_size=1, max_size=64)
BITS = st.integers(min_value=0, max_value=10**6)
FRAMES = st.lists(st.binary(max_size=40), min_size=1, max_size=6)


def _flip(data: bytes, bit: int) -> bytes:
    bit %= 8 * len(data)
    return bytes(b ^ (1 << bit % 8 if i == bit // 8 else 0) for i, b in enumerate(data))


def _shake(dialler: Handshake, listener: Handshake, damage: dict[int, int] | None = None) -> None:
    """Carry the four messages; ``damage`` says which of them gets which bit flipped."""
    message, ends = dialler.begin(), (listener, dialler)
    for number in range(4):
        if damage and number in damage:
            message = _flip(message, damage[number])
        message = ends[number % 2].feed(message)


def _pair(key: bytes = b"key", other: bytes | None = None) -> tuple[Handshake, Handshake]:
    return Handshake(key, True), Handshake(key if other is None else other, False)


@given(KEYS, FRAMES)
def test_ends_with_one_key_understand_each_other(key: bytes, frames: list[bytes]) -> None:
    dialler, listener = _pair(key)
    _shake(dialler, listener)
    assert dialler.seals is not None
    assert listener.seals is not None
    for there, here in ((dialler.seals, listener.seals), (listener.seals, dialler.seals)):
        for frame in frames:
            assert here.receiving.check(frame, there.sending.next(frame))


@given(KEYS, KEYS)
def test_other_keys_are_found_out_by_the_listener(key: bytes, other: bytes) -> None:
    if key == other:
        return
    dialler, listener = _pair(key, other)
    with pytest.raises(HandshakeError, match="another DATADIST_AUTH_KEY"):
        _shake(dialler, listener)
    assert dialler.seals is None
    assert listener.seals is None


def test_a_refusal_names_the_key_and_the_crowd() -> None:
    """Whoever is disconnected of a crowded listener cannot tell that from another key."""
    dialler, listener = _pair()
    dialler.feed(listener.feed(dialler.begin()))
    for reason in ("another DATADIST_AUTH_KEY", "too many unauthenticated connections", "its log"):
        assert reason in dialler.closed()


@given(st.integers(0, 3), BITS)
def test_a_bit_changed_on_the_way_leaves_nobody_fooled(number: int, bit: int) -> None:
    dialler, listener = _pair()
    with pytest.raises(HandshakeError):
        _shake(dialler, listener, {number: bit})
    assert dialler.seals is None


@given(st.lists(st.integers(1, 100), min_size=1))
def test_messages_may_come_in_any_pieces(sizes: list[int]) -> None:
    dialler, listener = _pair()
    message, turn, taken = dialler.begin(), 0, 0
    ends = (listener, dialler)
    while message:
        end, answer = ends[turn % 2], b""
        while message:
            size = min(sizes[taken % len(sizes)], end.wanted)
            taken += 1
            assert 0 < end.wanted <= 48
            answer += end.feed(message[:size])
            message = message[size:]
        message, turn = answer, turn + 1
    assert dialler.seals is not None
    assert listener.seals is not None
    assert dialler.wanted == listener.wanted == 0


@given(st.binary(min_size=1, max_size=48))
def test_strangers_are_recognised_by_their_first_wrong_byte(said: bytes) -> None:
    strange = not GREETING.startswith(said[: len(GREETING)])
    listener = Handshake(b"key", False)
    if strange:
        with pytest.raises(HandshakeError, match="no datadist engine"):
            listener.feed(said)
    else:
        listener.feed(said)
    assert listener.seals is None


def test_a_listener_that_only_repeats_what_it_hears_is_refused() -> None:
    dialler = Handshake(b"key", True)
    proof = dialler.feed(dialler.begin())
    with pytest.raises(HandshakeError):
        dialler.feed(proof)


def test_messages_of_another_connection_are_worth_nothing() -> None:
    dialler, listener = _pair()
    hello = dialler.begin()
    proof = dialler.feed(listener.feed(hello))
    assert listener.feed(proof)
    again = Handshake(b"key", False)
    again.feed(hello)
    with pytest.raises(HandshakeError):
        again.feed(proof)


@given(FRAMES, st.sampled_from(["change", "repeat", "leave out", "swap"]), BITS, BITS)
def test_frames_count_once_and_in_order(
    frames: list[bytes], how: str, place: int, bit: int
) -> None:
    sending, receiving = Seal(b"key"), Seal(b"key")
    wire = [frame + sending.next(frame) for frame in [*frames, b"last"]]
    at = place % (len(wire) - 1)
    if how == "change":
        wire[at] = _flip(wire[at], bit)
    elif how == "repeat":
        wire.insert(at, wire[at])
    elif how == "leave out":
        del wire[at]
    else:
        wire[at], wire[at + 1] = wire[at + 1], wire[at]
    assert not all(receiving.check(frame[:-32], frame[-32:]) for frame in wire)


def test_directions_have_keys_of_their_own() -> None:
    dialler, listener = _pair()
    _shake(dialler, listener)
    assert dialler.seals is not None
    tag = dialler.seals.sending.next(b"frame")
    assert not dialler.seals.receiving.check(b"frame", tag)


@pytest.mark.parametrize("dialled", [True, False])
def test_the_key_is_in_no_representation(dialled: bool) -> None:
    assert "secret" not in repr(Handshake(b"secret", dialled))
