"""Messages that renew leases."""

from __future__ import annotations

from datadist_vllm import renewals


def test_keys_arrive() -> None:
    keys = list(range(2**64 - 600, 2**64))
    messages = renewals.encode(keys)
    assert max(len(message) for message in messages) <= 8192
    assert [key for message in messages for key in renewals.decode(message)] == keys


def test_other_messages_name_no_keys() -> None:
    assert renewals.decode(b"something else 5") == []
    assert renewals.decode(renewals.PREFIX + b"x -1 " + b"9" * 21) == []
