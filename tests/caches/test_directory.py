"""Keys of caches: which binding a key means, and what is left when others go (directory.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from datadist.caches.directory import KeyDirectory, KeyName, Space
from datadist.control.messages import Binding, Entry

BLOCKS, REQUEST, PREFIX = KeyName("blocks", 0, 7), KeyName("request", 5, 7), KeyName("prefix", 5, 7)


def _entry(cache_id: int, bindings: Sequence[tuple[int, KeyName]]) -> Entry:
    bound: list[Any] = [
        Binding(id=number, slot=number % 10, space=name.space, key=name.key, model=name.model)
        for number, name in bindings
    ]
    return Entry(
        cache_id=cache_id, blocks=any(name.space == "blocks" for _, name in bindings), bases=[64],
        stride=1, count=10, tensor_size=10, data_type=2, placement=0, pooled=True, accessible=True,
        regions=[1], bindings=bound,
    )  # fmt: skip


def _directory(*entries: Entry) -> KeyDirectory:
    directory = KeyDirectory()
    for entry in entries:
        directory.put(entry)
    return directory


def _found(
    directory: KeyDirectory, name: KeyName, ignoring: Sequence[int] = ()
) -> tuple[int, int] | None:
    found = directory.find(name, ignoring)
    return None if found is None else (found[0].cache_id, found[1].id)


@pytest.mark.parametrize("name", [BLOCKS, REQUEST, PREFIX])
def test_of_caches_with_one_key_the_last_blocks_cache_and_the_first_other_one_counts(
    name: KeyName,
) -> None:
    directory = _directory(*(_entry(number, [(10 * number, name)]) for number in (1, 2, 3)))
    order = [3, 2, 1] if name.space == "blocks" else [1, 2, 3]
    for number in order:
        assert _found(directory, name) == (number, 10 * number)
        directory.remove(number)
    assert _found(directory, name) is None


@pytest.mark.parametrize("name", [BLOCKS, REQUEST])
def test_a_binding_that_was_consumed_or_unbound_leaves_the_others(name: KeyName) -> None:
    directory = _directory(*(_entry(number, [(10 * number, name)]) for number in (1, 2, 3)))
    first, second = (30, 20) if name.space == "blocks" else (10, 20)
    assert _found(directory, name, [first]) == (second // 10, second)
    directory.unbind(first // 10, first)
    assert _found(directory, name) == (second // 10, second)
    assert first // 10 in directory.entries
    directory.unbind(first // 10, first)
    assert _found(directory, name) == (second // 10, second)


def test_keys_of_other_spaces_and_models_are_others() -> None:
    directory = _directory(_entry(1, [(10, REQUEST)]), _entry(2, [(20, PREFIX)]))
    assert _found(directory, REQUEST) == (1, 10)
    assert _found(directory, PREFIX) == (2, 20)
    spaces: tuple[Space, ...] = ("request", "prefix")
    for space in spaces:
        assert _found(directory, KeyName(space, 5, 8)) is None
        assert _found(directory, KeyName(space, 6, 7)) is None
    assert directory.binding_ids() == {10, 20}


def test_an_entry_that_comes_again_replaces_the_earlier_one() -> None:
    directory = _directory(_entry(1, [(10, BLOCKS)]), _entry(2, [(20, BLOCKS)]))
    directory.put(_entry(1, [(11, REQUEST)]))
    assert _found(directory, BLOCKS) == (2, 20)
    assert _found(directory, REQUEST) == (1, 11)
    directory.remove(2)
    assert _found(directory, BLOCKS) is None
    directory.replace_all([_entry(3, [(30, BLOCKS)])])
    assert _found(directory, BLOCKS) == (3, 30)
    assert _found(directory, REQUEST) is None
    assert list(directory.entries) == [3]
