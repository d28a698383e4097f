"""The handshake between two true ends whose bytes are changed on the way, and with strangers.

Nobody gets in without the key, nor by a transcript that was touched; who has the key, and whose bytes
arrive, does get in.
"""

from __future__ import annotations

from datadist.control.channel import Handshake, HandshakeError
from tests.fuzz.choices import Choices, tampered

KEY = b"a key of more than sixteen bytes"
WRONG = b"another of more than sixteen bytes"
FRAMES = 6


class End:
    """One end, what it was sent, and what reached it."""

    def __init__(self, dialled: bool, key: bytes = KEY) -> None:
        self.handshake = Handshake(key, dialled)
        self.sent = b""
        self.reached = b""
        self.refused = False

    @property
    def inside(self) -> bool:
        """Whether it took the other one for an engine."""
        return self.handshake.seals is not None

    def hear(self, data: bytes, choices: Choices) -> bytes:
        """Feed it bytes in pieces; what it answers."""
        said = b""
        while data and not self.refused and self.handshake.wanted:
            size = min(self.handshake.wanted, 1 + choices.byte() % 64)
            piece, data = data[:size], data[size:]
            self.reached += piece
            try:
                said += self.handshake.feed(piece)
            except HandshakeError:
                self.refused = True
        self.sent += said
        return said


def relay(choices: Choices) -> bool:
    """Two ends with the same key; what each says may be changed on its way."""
    dialler, listener = End(True), End(False)
    said: list[bytes] = []
    data, source, target = dialler.handshake.begin(), dialler, listener
    dialler.sent += data
    touched = False
    while data:
        said.append(data)
        arrives = tampered(data, choices, said)
        touched = touched or arrives != data
        answer = target.hear(arrives, choices)
        data, source, target = answer, target, source
    hellos = (
        dialler.reached[:48] == listener.sent[:48] and listener.reached[:48] == dialler.sent[:48]
    )
    for end, other in ((dialler, listener), (listener, dialler)):
        untouched = hellos and len(other.sent) == 80 and end.reached == other.sent
        assert end.inside == untouched, (
            f"dialled {end.handshake.dialled}: {end.inside=} {untouched=}"
        )
    assert touched or (dialler.inside and listener.inside), "the right key did not get in"
    return dialler.inside and listener.inside and _frames(choices, dialler, listener)


def _frames(choices: Choices, dialler: End, listener: End) -> bool:
    """Frames and their MACs: from the first one that was touched on, none is genuine."""
    assert dialler.handshake.seals is not None
    assert listener.handshake.seals is not None
    genuine, earlier = True, [b""]
    for number in range(FRAMES):
        frame = b"frame %d" % number
        sealed = frame + dialler.handshake.seals.sending.next(frame)
        arrived = tampered(sealed, choices, earlier)
        earlier.append(sealed)
        genuine = genuine and arrived == sealed
        taken = listener.handshake.seals.receiving.check(arrived[:-32], arrived[-32:])
        assert taken == genuine, f"frame {number}: {taken=} {genuine=}"
        if not taken:  # the connection ends
            return False
    return True


def unauthenticated(choices: Choices) -> bool:
    """An end that meets somebody without the key, who has heard other conversations."""
    end = End(bool(choices.byte() % 2))
    said = [end.handshake.begin(), *conversation()]
    wrong = Handshake(WRONG, not end.handshake.dialled)
    said.append(wrong.begin())
    while not choices.over and not end.refused:
        said.append(end.hear(attempt(choices, said, wrong), choices))
    assert not end.inside, "a stranger without the key got in"
    return False


def attempt(choices: Choices, said: list[bytes], wrong: Handshake) -> bytes:
    """What a stranger says next: anything, what it has heard, or what it makes of a wrong key."""
    match choices.byte() % 4:
        case 0:
            return choices.take(1 + choices.byte() % 96)
        case 1:
            return tampered(choices.pick(said), choices, said)
        case 2:
            return said[-1]
        case _:
            try:
                return wrong.feed(said[-1][: wrong.wanted]) if wrong.wanted else bytes(32)
            except HandshakeError:
                return bytes(32)


def conversation() -> list[bytes]:
    """What two ends with the key said to each other."""
    dialler, listener = Handshake(KEY, True), Handshake(KEY, False)
    said = [dialler.begin()]
    for end in (listener, dialler, listener, dialler):
        said.append(end.feed(said[-1]))
    assert dialler.seals is not None
    assert listener.seals is not None
    return said[:-1]


def handshake(data: bytes) -> bool:
    """The target: whether both got in, untouched."""
    choices = Choices(data)
    return (unauthenticated if choices.byte() % 4 == 3 else relay)(choices)
