"""What users read of a wrong pool: where, what was given, what was probably meant."""

from __future__ import annotations

import pytest

from tests.engine.test_options import ON, parse, refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1GB", "(in bytes: 1073741824)"),
        ("1073741824", "Input should be an object (in bytes: 1073741824)"),
        ('{"memory_size": "512 MiB"}', "not '512 MiB' (in bytes: 536870912)"),
        ('{"memory_size": "64k"}', "(in bytes: 65536)"),
        ('{"memory_size": 1024.0}', "not 1024.0 (in bytes: 1024)"),
        ('{"memory_size": true}', "memory_size: Input should be a valid integer, not True;"),
        ('{"memory_size": 1, "page_shift": 9}', "page_shift: Input should be greater than"),
        (
            '{"memorysize": 5}',
            "memory_size: Field required, and 'memorysize' is none of the fields",
        ),
        ('{"memory_size": 1,}', "trailing comma at line 1 column 19"),
        ("{'memory_size': 1}", "JSON has double quotes"),
        ("/etc/pool.json", "is the name of a file"),
        ("", "it is empty"),
    ],
)
def test_a_wrong_pool_says_what_was_meant(text: str, said: str) -> None:
    for key in ("llm.MemPoolConfig", "llm.HostMemPoolConfig"):
        found = refused({**ON, key: text})
        assert found.startswith(f"option {key} is {text!r}: ")
        assert said in found


def test_a_field_without_effect_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    text = '{"memory_size": 65536, "page_shft": 20, "other": 1}'
    pool = parse({**ON, "llm.MemPoolConfig": text}).device_pool
    assert pool is not None
    assert pool.page_shift == 16
    assert caplog.messages == [
        "option llm.MemPoolConfig has a field 'page_shft', which has no effect; did you mean page_shift?"
    ]


def test_a_pool_of_megabytes_of_text_is_refused_unread() -> None:
    text = "{" + ",".join(f'"memory_siz{n}": 1' for n in range(200_000)) + "}"
    found = refused({**ON, "llm.MemPoolConfig": text})
    assert f"it has {len(text)} characters, more than 4096" in found
    assert len(found) < 1000
