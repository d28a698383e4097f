"""The control protocol: every message two engines exchange, and its frame on the wire.

A frame is a 4-byte big-endian length and that many bytes of JSON, an object whose ``kind`` names
one of the models below; or, for a :class:`Notice`, a zero byte and the bytes of the program. Nothing is
ever unpickled; what does not validate ends the connection.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    model_validator,
)

from datadist.base.parsing import parse
from datadist.transport import Offer

WIRE_VERSION = 5
"""Version of this protocol; engines of different versions refuse each other by name."""

MAX_FRAME = 16 << 20
"""Largest frame in bytes; a longer one ends the connection."""

MAX_NOTICE = 8 << 10
"""Most bytes of a message of the program."""

MAX_HELLO = 4096
"""Largest frame of a peer that has not said hello yet."""

MAX_FDS = Offer.MAX_FDS
"""Most descriptors that one frame may carry."""

MAX_ELEMENTS = 600_000
"""Most elements of a frame: commas and opening brackets and braces, those inside of texts too.

An entry of the most tensors, regions and keys has 524,300."""

MAX_TENSORS = 1 << 16
"""Tensors of one cache."""

MAX_KEYS = 1 << 16
"""Keys of one cache, which is told to peers in one message: with the most tensors 12 MiB."""

MAX_METADATA = 8 << 10
"""Bytes that a program gives the peers of a link."""

MAX_CUTS = 1 << 10
"""Places inside of the blocks of one cache where registered ranges meet."""

MAX_CHANGES = 1 << 16
"""Caches that one message of a directory adds, or removes, and keys that it takes away."""

MAX_RELEASES = 1 << 10
"""Grants that one message releases, by generation and by key."""

NO_ANSWER = 0
"""The number of a message that is not acknowledged."""

MAX_SECONDS = (2**31 - 1) / 1000
"""Longest time that a message may name, which is the longest that a program can set."""

HEADER = struct.Struct(">I")

UInt64 = Annotated[int, Field(ge=0, lt=1 << 64)]
Address = Annotated[int, Field(ge=0, lt=1 << 63)]
"""What fits the int64 vectors of transfers."""
Rank = Annotated[int, Field(ge=0, lt=1 << 32)]
ElementType = Annotated[int, Field(ge=0, lt=1 << 32)]
"""Number of a :class:`datadist.types.DataType`; a newer peer may have others."""
Text = Annotated[str, Field(max_length=4096)]
Name = Annotated[str, Field(max_length=80)]
Token = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Endpoints = Annotated[list[Text], Field(max_length=16, fail_fast=True)]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]


def _short_metadata(metadata: bytes) -> bytes:
    if len(metadata) > MAX_METADATA:
        raise ValueError(f"{len(metadata)} bytes of metadata are more than {MAX_METADATA}")
    return metadata


class _Message(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64"
    )


class Hello(_Message):
    """First message of either side. With ``dial_back`` the sender disconnects and asks to be dialled
    back.

    Over TCP ``dial_back`` of the listener means that the two engines must connect through their runtime
    directory. ``refused`` comes with a ``dial_back`` without an answer: the sender may not link, since
    another live engine of its job has its cluster id.
    """

    kind: Literal["hello"] = "hello"
    wire: int
    incarnation: Token
    cluster_id: UInt64
    dial_back: bool = False
    refused: bool = False
    job: Name = ""
    program: Name = ""
    """What runs there, for people."""


class AskReport(_Message):
    """First and only message of a process of the same user that shows engines (`datadist top`)."""

    kind: Literal["ask_report"] = "ask_report"


class Report(_Message):
    """The answer, see :mod:`datadist.engine.reports`; engines do not take it."""

    kind: Literal["report"] = "report"
    report: dict[str, Any]


class Welcome(_Message):
    """Over TCP: the dialler accepts the listener's hello and uses this connection as the session."""

    kind: Literal["welcome"] = "welcome"


class Announce(_Message):
    """The sender waits in ``link`` for the domain described here.

    ``endpoints`` are where members on other hosts can dial the sender.
    """

    kind: Literal["announce"] = "announce"
    link: UInt64
    name: Text
    ranks: Annotated[list[tuple[UInt64, Rank]], Field(max_length=4, fail_fast=True)]
    table: Annotated[str, Field(max_length=1 << 20)]
    backend: Text
    one_sided: bool
    endpoints: Endpoints = Field(default_factory=list)


class Withdraw(_Message):
    """The sender gave up its ``link`` before the domain was formed."""

    kind: Literal["withdraw"] = "withdraw"
    link: UInt64


class Mismatch(_Message):
    """The receiver's ``link`` can never match the sender's: ``reason`` says what differs."""

    kind: Literal["mismatch"] = "mismatch"
    link: UInt64
    reason: Text


class Member(_Message):
    """One engine of a domain being formed."""

    rank: Rank
    cluster_id: UInt64
    incarnation: Token
    link: UInt64
    endpoints: Endpoints = Field(default_factory=list)


class Form(_Message):
    """Rank 0 found every member: each member's ``link`` now builds ``domain``."""

    kind: Literal["form"] = "form"
    domain: Token
    members: Annotated[list[Member], Field(min_length=2, max_length=4, fail_fast=True)]


class Dissolve(_Message):
    """A member left while the domain was built: go back to waiting."""

    kind: Literal["dissolve"] = "dissolve"
    domain: Token
    reason: Text


class Fail(_Message):
    """Building the domain failed for good."""

    kind: Literal["fail"] = "fail"
    domain: Token
    reason: Text


class OfferMessage(_Message):
    """The transport's offer to the receiver; the frame carries ``fds`` descriptors."""

    kind: Literal["offer"] = "offer"
    domain: Token
    data: bytes
    fds: Annotated[int, Field(ge=0, le=MAX_FDS)]
    regions: Annotated[list[UInt64], Field(max_length=Offer.MAX_REGIONS, fail_fast=True)]


class Attached(_Message):
    """The sender has processed one offer of the receiver: it accepted or refused it.

    :class:`Ready` may say so instead.
    """

    kind: Literal["attached"] = "attached"
    domain: Token


class Ready(_Message):
    """The sender has attached every offer of the domain; ``metadata`` is its program's.

    It comes again where the program gives metadata to a link that the other end has formed.
    """

    kind: Literal["ready"] = "ready"
    domain: Token
    metadata: Annotated[bytes, AfterValidator(_short_metadata)] = b""
    attached: bool = False
    """Whether this stands for an :class:`Attached` as well."""


class Left(_Message):
    """The sender unlinked the domain; acknowledged like a directory update."""

    kind: Literal["left"] = "left"
    domain: Token
    seq: UInt64


class Dial(_Message):
    """The sender asks the receiver for a link of the two (`link_clusters`); answered by Form."""

    kind: Literal["dial"] = "dial"
    link: UInt64
    backend: Text
    one_sided: bool
    seconds: Seconds
    """How long the sender waits."""


class Refused(_Message):
    """The receiver's :class:`Dial` cannot be answered by a link."""

    kind: Literal["refused"] = "refused"
    link: UInt64
    status: Annotated[int, Field(ge=0, lt=1 << 32)]
    reason: Text


class Duplicate(_Message):
    """The sender found two engines with one cluster id. ``other`` is the one that is not the
    receiver.

    "replaced": the receiver's link ends, and the other engine has one in its place. "took": the receiver
    has the place of the other one. "refused": the other one may not link, beside the sender.
    """

    kind: Literal["duplicate"] = "duplicate"
    what: Literal["replaced", "took", "refused"]
    other: Name


class Binding(_Message):
    """A key on one slot of a cache; ``id`` is never reused by its owner."""

    id: UInt64
    slot: UInt64
    space: Literal["request", "prefix", "blocks"]
    key: UInt64
    model: UInt64


class Entry(_Message):
    """What peers need to know of one cache: where it lies and which keys name it."""

    cache_id: UInt64
    blocks: bool
    bases: Annotated[list[Address], Field(min_length=1, max_length=MAX_TENSORS, fail_fast=True)]
    stride: Address
    count: Address
    tensor_size: Address
    data_type: ElementType
    tensors_per_layer: Annotated[int, Field(ge=1, lt=1 << 32)] = 2
    placement: Annotated[int, Field(ge=0, le=1)]
    pooled: bool
    """Whether pulls consume its keys (in two-sided mode)."""
    accessible: bool
    regions: Annotated[list[UInt64], Field(max_length=MAX_TENSORS, fail_fast=True)]
    bindings: Annotated[list[Binding], Field(max_length=MAX_KEYS, fail_fast=True)]
    cuts: Annotated[list[Address], Field(max_length=MAX_CUTS, fail_fast=True)] = Field(
        default_factory=list
    )
    """Where two regions meet inside of a block, ascending."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a slot or block; they begin ``stride`` bytes apart, and the last ends the tensor."""
        return self.tensor_size - (self.count - 1) * self.stride

    @property
    def dense(self) -> bool:
        """Whether slots or blocks lie side by side."""
        return self.tensor_size == self.count * self.stride

    @model_validator(mode="after")
    def _check_layout(self) -> Entry:
        """No slot may lie outside of its tensor or in another one, and no address overflow."""
        if not 0 < self.block_bytes <= self.stride:
            raise ValueError(
                f"{self.count} slots that begin {self.stride} bytes apart do not fill "
                f"{self.tensor_size} bytes"
            )
        if len(self.cuts) > len(self.regions) or self.cuts != sorted(self.cuts):
            raise ValueError(f"{len(self.cuts)} cuts of {len(self.regions)} regions are no cuts")
        if max(self.bases) + self.tensor_size >= 1 << 63:
            raise ValueError(f"{self.tensor_size} bytes at {max(self.bases):#x} are no memory")
        return self


class Directory(_Message):
    """Changes of the sender's key directory, or with ``reset`` all of it."""

    kind: Literal["directory"] = "directory"
    seq: UInt64
    """Answered by :class:`Ack`, unless it is :data:`NO_ANSWER`: in what begins a subscription."""
    reset: bool = False
    last: bool = True
    """Whether nothing more of what ``reset`` began is to come."""
    upsert: Annotated[list[Entry], Field(max_length=MAX_CHANGES, fail_fast=True)] = Field(
        default_factory=list
    )
    remove: Annotated[list[UInt64], Field(max_length=MAX_CHANGES, fail_fast=True)] = Field(
        default_factory=list
    )
    unbind: Annotated[
        list[tuple[UInt64, UInt64]], Field(max_length=MAX_CHANGES, fail_fast=True)
    ] = Field(default_factory=list)
    """Cache and binding id of each key that a cache lost."""


class Ack(_Message):
    """The sender does not access anything that was revoked up to ``seq`` any more."""

    kind: Literal["ack"] = "ack"
    seq: UInt64


class Sync(_Message):
    """Ask for :class:`Synced` after everything that was published before."""

    kind: Literal["sync"] = "sync"
    id: UInt64


class Synced(_Message):
    """Answer to :class:`Sync`."""

    kind: Literal["synced"] = "synced"
    id: UInt64


class Consume(_Message):
    """The sender has pulled tensors ``[start, stop)`` of the cache slot that ``binding`` names."""

    kind: Literal["consume"] = "consume"
    cache_id: UInt64
    binding: UInt64
    start: UInt64
    stop: UInt64


class Fetch(_Message):
    """Ask the receiver to read memory of the sender into its own caches; answered by Fetched.

    ``source``, ``target`` and ``length`` are equal numbers of int64: addresses at the sender, at the
    receiver, and bytes. ``data_type`` is that of the sender's cache; with ``same_type`` the receiver
    refuses to write into caches of another type.
    """

    kind: Literal["fetch"] = "fetch"
    id: UInt64
    domain: Token
    source: bytes
    target: bytes
    length: bytes
    data_type: ElementType
    same_type: bool
    strides: Annotated[list[Address], Field(max_length=64, fail_fast=True)] = Field(
        default_factory=list
    )
    """Bytes from one block of the receiver to the next, as the sender knows; none where no blocks are
    written."""
    seconds: Seconds


class Fetched(_Message):
    """Answer to :class:`Fetch`: a status code, and why."""

    kind: Literal["fetched"] = "fetched"
    id: UInt64
    status: Annotated[int, Field(ge=0, lt=1 << 32)]
    reason: Text


class Verify(_Message):
    """Ask the receiver for a checksum of ranges of its caches; answered by :class:`Verified`.

    ``address`` and ``length`` are equal numbers of int64.
    """

    kind: Literal["verify"] = "verify"
    id: UInt64
    address: bytes
    length: bytes
    seconds: Seconds


class Verified(_Message):
    """Answer to :class:`Verify`: a status code and why, and the CRC-32 of the ranges in order."""

    kind: Literal["verified"] = "verified"
    id: UInt64
    status: Annotated[int, Field(ge=0, lt=1 << 32)]
    reason: Text
    crc: Annotated[int, Field(ge=0, lt=1 << 32)]


class AskGrant(_Message):
    """Ask for the grant of a key; answered by :class:`GrantAnswer`, with its token if there is one."""

    kind: Literal["ask_grant"] = "ask_grant"
    id: UInt64
    space: Literal["request", "prefix"]
    key: UInt64
    model: UInt64


class CheckGrant(_Message):
    """Ask whether a grant lives; answered by :class:`GrantAnswer`, without a token."""

    kind: Literal["check_grant"] = "check_grant"
    id: UInt64
    generation: UInt64


class GrantAnswer(_Message):
    """Answer to :class:`AskGrant` and :class:`CheckGrant`, after all that was published before."""

    kind: Literal["grant_answer"] = "grant_answer"
    id: UInt64
    live: bool
    token: Annotated[bytes, Field(max_length=1 << 20)] = b""


class ReleaseGrants(_Message):
    """The sender has finished with these grants, by generation, or by key where it did not ask."""

    kind: Literal["release_grants"] = "release_grants"
    generations: Annotated[list[UInt64], Field(max_length=MAX_RELEASES, fail_fast=True)] = Field(
        default_factory=list
    )
    keys: Annotated[
        list[tuple[Literal["request", "prefix"], UInt64, UInt64]],
        Field(max_length=MAX_RELEASES, fail_fast=True),
    ] = Field(default_factory=list)


class Notice(_Message):
    """A message of the sender's program to the receiver's; it has taken a credit (:class:`Room`).

    Its bytes travel as they are. As base64 in JSON 8 KiB cost 98 us at both ends instead of 1.
    """

    kind: Literal["notice"] = "notice"
    data: bytes


class AskRoom(_Message):
    """The sender waits to send a :class:`Notice`, and has used all of its ``used`` credits."""

    kind: Literal["ask_room"] = "ask_room"
    used: UInt64


class Room(_Message):
    """The receiver may send so many :class:`Notice` in this session, those that it has sent included."""

    kind: Literal["room"] = "room"
    limit: UInt64


class Idle(_Message):
    """The sender needs this session no more, until it says otherwise."""

    kind: Literal["idle"] = "idle"


class Goodbye(_Message):
    """The sender closes the session in an orderly way."""

    kind: Literal["goodbye"] = "goodbye"


_InJson = (
    Hello
    | AskReport
    | Welcome
    | Announce
    | Withdraw
    | Mismatch
    | Form
    | Dissolve
    | Fail
    | OfferMessage
    | Attached
    | Ready
    | Left
    | Dial
    | Refused
    | Duplicate
    | Directory
    | Ack
    | Sync
    | Synced
    | Consume
    | Fetch
    | Fetched
    | Verify
    | Verified
    | AskGrant
    | CheckGrant
    | GrantAnswer
    | ReleaseGrants
    | AskRoom
    | Room
    | Idle
    | Goodbye
)
Message = _InJson | Notice
Sent = Message | Report
"""What an engine may send; it does not take all of that."""

_adapter: TypeAdapter[_InJson] = TypeAdapter(
    Annotated[_InJson, Field(discriminator="kind")],
    config=ConfigDict(cache_strings="keys"),  # tokens come once: a cache of them only grows
)

_validate: Callable[[bytes], _InJson] = _adapter.validator.validate_json


def seconds_until(deadline: float) -> float:
    """The remaining seconds until a deadline (time.monotonic), for messages to other hosts."""
    return min(max(0.001, deadline - time.monotonic()), MAX_SECONDS)


def encode(message: Sent) -> bytes:
    """The frame of ``message``. Raises ``ValueError`` when it is larger than a frame may be."""
    if isinstance(message, Notice):
        return HEADER.pack(1 + len(message.data)) + b"\0" + message.data
    body = message.__pydantic_serializer__.to_json(message)
    if len(body) > MAX_FRAME:
        raise ValueError(f"a {message.kind} message of {len(body)} bytes exceeds {MAX_FRAME}")
    return HEADER.pack(len(body)) + body


def decode(body: bytes | bytearray | memoryview) -> Message:
    """The message in a frame's body. Raises ``ValueError``, in one line, when it is none."""
    content = bytes(body)
    if content[:1] != b"\0":
        return parse(content, MAX_ELEMENTS, _validate)
    if len(content) > 1 + MAX_NOTICE:
        raise ValueError(f"a message of {len(content) - 1} bytes is larger than {MAX_NOTICE}")
    return Notice(data=content[1:])
