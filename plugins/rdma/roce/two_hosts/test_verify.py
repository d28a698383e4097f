"""What people run on two hosts of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from roce import library
from roce.nodes import RemoteNode, start_here


def test_verify_on_two_hosts(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    environ = {
        "DATADIST_AUTH_KEY": "0123456789abcdef0123456789abcdef",
        "DATADIST_RENDEZVOUS": "10.99.0.1:7700",
        "DATADIST_RUNTIME_DIR": str(tmp_path / "run"),
    }
    first, second = start_here(environ), RemoteNode({**environ, "DATADIST_RUNTIME_DIR": "/run/dd"})
    try:
        arguments = ("--device-ip", "10.99.0.1", "10.99.0.2", "--size", "16", "--ib-read-bw")
        first.begin(library.verify, 0, *arguments)
        second.begin(library.verify, 1, *arguments)
        (mine, errors), (theirs, more) = first.result(300), second.result(300)
        print("\n".join([*mine, errors, "--", *theirs, more]))
        marks = {line.split(":")[0]: line.split()[0] for line in mine + theirs}
        # Ratios of single rounds on a busy host say little: they are shown, and not judged.
        bad = [what for what, mark in marks.items() if mark == "FAIL" and "against" not in what]
        assert not bad
        for what in ("link", "both ranks finish", "ib_read_bw"):
            assert marks[f"ok    {what}"] == "ok"
        for size in (4, 64, 1024):
            for what in ("pull in", "push in", "pushed"):
                assert marks[f"ok    {what} blocks of {size} KiB"] == "ok"
        ratios = [line for line in theirs if "against" in line]
        assert len(ratios) == 2
        for line in ratios:
            what, figures = line.split("against ")[1].split(": ", 1)
            record_property(f"two machines, pull against {what}", figures.split(", good")[0])
    finally:
        first.close()
        second.close()
