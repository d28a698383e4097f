"""The conformance kit with ranks on different hosts: `datadist conformance NAME --far`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from datadist.testing import TransportConformance, installed
from datadist.testing.families.kit import Kit
from tests import hosts

ROOT = Path(__file__).parents[2]
TRANSPORTS = {
    "tcp": "tests.tcp_pair_engine:TcpPairTransport",
    "writes-near": "tests.tcp_pair_engine:WritesNear",
    "with-fds": "tests.netcopy:NetCopyWithDescriptors",
    "at-home": "tests.pair_engine:PairTransport",
}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with installed(TRANSPORTS) as place:
        yield place


def _run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "datadist", "conformance", *args],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


KINDS = [
    pytest.param("--far=namespaces", marks=hosts.needed),
    "--far=directories",
]


@pytest.mark.parametrize("far", KINDS)
def test_ranks_meet_over_the_network(folder: Path, far: str) -> None:
    """The device of the host is in the option, and engines link by a table of several servers."""
    select = "every_cluster_pulls or a_domain_that_differs or all_pairs_at_once or killed"
    done = _run(folder, "tcp", far, "--option", "device={device}", "-k", select)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"device {'eth0' if 'namespaces' in far else 'lo'}" in done.stdout.splitlines()[1]
    assert "10 passed, 0 failed, 0 skipped" in done.stdout


@hosts.needed
def test_two_hosts_and_a_wrong_device(folder: Path) -> None:
    select = "every_cluster_pulls or all_pairs_at_once"
    done = _run(folder, "tcp", "--far", "--hosts", "2", "--option", "device=eth0", "-k", select)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "far: 2 network namespaces, 10.77.0.1 to 10.77.0.2" in done.stdout
    done = _run(folder, "tcp", "--far", "--option", "device=eth7", "-k", "all_pairs_at_once")
    assert done.returncode == 1
    assert "there is no device eth7" in done.stdout


@hosts.needed
def test_a_host_that_falls_silent(folder: Path) -> None:
    done = _run(folder, "tcp", "--far", "-k", "SilentHosts")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed, 0 failed, 0 skipped" in done.stdout


def test_without_cables_it_is_skipped(folder: Path) -> None:
    done = _run(folder, "tcp", "-k", "SilentHosts or probe_is_quick")
    assert "far is False: all ranks are on this host" in done.stdout
    done = _run(folder, "tcp", "--far=directories", "-k", "SilentHosts or probe_is_quick")
    assert "far is 'directories': loopback has no cable to cut" in done.stdout


def test_the_link_says_what_it_can_do_with_a_rank(folder: Path) -> None:
    """It writes near ranks only: the tests of writes run near, and are skipped far."""
    near = _run(folder, "writes-near", "-k", "sizes[1-write] or sizes[1-read]")
    assert "2 passed, 0 failed, 0 skipped" in near.stdout, near.stdout + near.stderr
    far = _run(folder, "writes-near", "--far", "-k", "sizes[1-write] or sizes[1-read]")
    assert far.returncode == 0, far.stdout + far.stderr
    assert "skipped  sizes[1-write]: capabilities.one_sided_write is False" in far.stdout


def test_descriptors_for_another_host_are_found(folder: Path) -> None:
    near = _run(folder, "with-fds", "-k", "an_offer_can_be_carried")
    assert near.returncode == 0, near.stdout + near.stderr
    done = _run(folder, "with-fds", "--far", "-k", "an_offer_can_be_carried")
    assert done.returncode == 1
    assert "has 1 descriptors, which cannot be sent to another host" in done.stdout


def test_what_stays_on_its_host_is_refused_at_once(folder: Path) -> None:
    done = _run(folder, "at-home", "--far", "-k", "Data")
    assert done.returncode == 2
    assert "at-home cannot be tested with --far: capabilities.same_host_only is True" in done.stderr
    assert "passed" not in done.stdout


def test_an_interrupt_is_no_success(folder: Path, tmp_path: Path) -> None:
    """Nothing is left, and what was not tested is not called conforming."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from datadist.cli import main; raise SystemExit(main())"
    program = subprocess.Popen(
        [sys.executable, "-c", code, "conformance", "tcp", "--far", "-k", "Linking"],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert program.stdout is not None
        while "  passed" not in program.stdout.readline():
            assert program.poll() is None
        program.send_signal(2)
        said, _ = program.communicate(timeout=60)
        assert program.returncode == 130, said
        assert "interrupted" in said
        assert "conforms" not in said
        assert list(tmp_path.iterdir()) == []
    finally:
        program.kill()
        program.wait()


def test_the_defaults_of_a_class_follow_its_hosts() -> None:
    """Tables of one server near; a server for each host far, with the key and the address of the host."""

    class Far(TransportConformance):
        transport = "tcp"
        far = "directories"
        far_hosts = 2
        extra = {"at": "{address}"}  # noqa: RUF012

    assert Kit.host(0) is None
    assert '"server_count": "1"' in Kit.rank_table(4)
    hosts_made, _ = Far.set_up_far()
    try:
        first, second = hosts_made.hosts
        options = Far.transport_options(3)
        assert (options.listen_address, options.extra["at"]) == (second.address, second.address)
        assert options.auth_key == first.auth_key.encode()
        table = Far.rank_table(4)
        assert '"server_count": "2"' in table
        assert (
            table.index(first.address) < table.index('"rank_id": "2"') < table.index(second.address)
        )
    finally:
        Far.teardown_class()
    assert Far.host(0) is None
