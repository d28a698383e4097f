"""The environment variables that choose between RoCE and HCCS inside a server."""

from __future__ import annotations

import pytest
from datadist_hccl import environment
from datadist_hccl.environment import MISSPELLED, PCIE, ROCE, mark_environment_read, settle
from datadist_hccl.transport import host_limit

from datadist.transport import TransportError


@pytest.mark.parametrize(
    ("before", "chosen", "after"),
    [
        ({}, None, {}),
        ({ROCE: "1"}, True, {ROCE: "1"}),
        ({ROCE: "1", PCIE: "0"}, True, {ROCE: "1", PCIE: "0"}),
        ({ROCE: "0"}, False, {ROCE: "0", PCIE: "1"}),
        ({ROCE: "0", PCIE: "0"}, False, {ROCE: "0", PCIE: "0"}),
        ({PCIE: "1"}, False, {PCIE: "1"}),
        ({MISSPELLED: "1"}, True, {MISSPELLED: "1", ROCE: "1"}),
        ({MISSPELLED: "1", ROCE: "0"}, False, {MISSPELLED: "1", ROCE: "0", PCIE: "1"}),
    ],
)
def test_what_is_chosen(before: dict[str, str], chosen: bool | None, after: dict[str, str]) -> None:
    environ = dict(before)
    assert settle(environ) is chosen
    assert environ == after
    assert settle(environ) is chosen


@pytest.mark.parametrize(
    "environ", [{ROCE: "1", PCIE: "1"}, {PCIE: "0"}, {ROCE: "yes"}, {ROCE: ""}, {PCIE: "2"}]
)
def test_what_hccl_would_refuse(environ: dict[str, str]) -> None:
    with pytest.raises(TransportError, match="HCCL_INTRA_"):
        settle(environ)


def test_what_changes_after_hccl_has_read_it_has_no_effect(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(environment, "_known", None)
    environ = {ROCE: "1", "HOME": "/"}
    mark_environment_read(environ)
    assert settle(environ) is True
    assert not caplog.messages
    for changed in ({ROCE: "0"}, {}, {ROCE: "1", PCIE: "1"}, {ROCE: "nonsense"}):
        caplog.clear()
        before = dict(changed)
        mark_environment_read(changed)
        assert settle(changed) is True
        assert changed == before
        assert "has no effect: HCCL has read its variables" in caplog.messages[0]


def test_the_misspelled_variable_warns(caplog: pytest.LogCaptureFixture) -> None:
    settle({MISSPELLED: "1"})
    assert ROCE in caplog.text


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("Version=24.1.rc1\n", 20),
        ("Version=25.4.9\n", 20),
        ("a=1\nVersion=25.5.0\n", 1024),
        ("", 20),
    ],
)
def test_the_driver_decides_how_much_host_memory(tmp_path: object, text: str, gib: int) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "version.info"
    assert host_limit(path) == 20 << 30
    path.write_text(text)
    assert host_limit(path) == gib << 30
