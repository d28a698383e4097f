"""Names of jobs, and what becomes of them in the runtime directory."""

from __future__ import annotations

import os
import string
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.control import stale_files
from datadist.control.job import described, job_name
from datadist.control.kernel import kernel_id
from datadist.control.runtime_dir import Address, RuntimeDir, job_of
from datadist.control.stale_files import remove_stale_files

ENGINE = Address(1, "a" * 32)
XDIST = {"PYTEST_XDIST_TESTRUNUID": "f" * 32, "PYTEST_XDIST_WORKER": "gw0"}


def test_the_variable_comes_before_the_worker_of_xdist() -> None:
    assert job_name({}) == ""
    assert job_name({"DATADIST_JOB": "serving-a"}) == "serving-a"
    assert job_name({"DATADIST_JOB": "serving-a", **XDIST}) == "serving-a"
    assert job_name({"DATADIST_JOB": "", **XDIST}) == "", "the empty name can be chosen"


def test_every_worker_of_every_run_is_a_job() -> None:
    names = {
        job_name({"PYTEST_XDIST_TESTRUNUID": run, "PYTEST_XDIST_WORKER": worker})
        for run in ("one/run", "another", "x" * 300)
        for worker in ("gw0", "gw1")
    }
    assert len(names) == 6
    assert job_name(XDIST) == job_name(dict(XDIST))
    assert all(job_name({"DATADIST_JOB": name}) == name for name in names)
    assert job_name({"PYTEST_XDIST_WORKER": "gw0"}) == ""


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".hidden", "-a", "a b", "a\n", "x" * 65, "naïve", "/etc", "a\0", "\udc80"]
)
def test_what_is_no_name_is_shown(name: str) -> None:
    with pytest.raises(ValueError, match="DATADIST_JOB is ") as caught:
        job_name({"DATADIST_JOB": name})
    assert repr(name) in str(caught.value)


@given(st.text(string.printable, max_size=70))
def test_a_name_is_refused_or_one_folder(name: str) -> None:
    try:
        chosen = job_name({"DATADIST_JOB": name})
    except ValueError:
        return
    place = Path("/run") / f".job-{chosen}" if chosen else Path("/run")
    assert job_of(place) == (Path("/run"), chosen)
    assert described(chosen)


def test_jobs_do_not_see_each_other(tmp_path: Path) -> None:
    first, second = RuntimeDir(tmp_path / "run", "one"), RuntimeDir(tmp_path / "run", "two")
    with first.listen(ENGINE):
        assert list(first.engines()) == [ENGINE]
        assert list(second.engines()) == []
        assert second.connect(ENGINE) is None
        assert first.other_jobs() == ["", "two"]
    first.close()
    second.close()


def test_the_place_of_a_job_goes_with_its_last_engine(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first, second = RuntimeDir(path, "one"), RuntimeDir(path, "one")
    sock = second.listen(ENGINE)
    first.leave()
    assert list(second.engines()) == [ENGINE], "another engine is there"
    second.remove(ENGINE)
    sock.close()
    second.leave()
    assert os.listdir(path) == []


def test_a_place_that_goes_while_an_engine_starts_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    starting, ending = RuntimeDir(path, "one"), RuntimeDir(path, "one")
    ending.leave()
    with starting.listen(ENGINE):
        later = RuntimeDir(path, "one")
        assert list(later.engines()) == [ENGINE]
        later.close()
    starting.close()


def test_a_sweep_takes_away_jobs_that_crashed_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "run"
    crashed, alive, own = (RuntimeDir(path, job) for job in ("crashed", "alive", ""))
    crashed.listen(ENGINE).close()  # its name stays, as after a crash
    with alive.listen(ENGINE):
        remove_stale_files(own)
        assert sorted(os.listdir(path)) == [".job-alive"]
        assert list(alive.engines()) == [ENGINE]
    for directory in (crashed, alive, own):
        directory.close()


def test_a_sweep_takes_claims_that_nobody_holds(tmp_path: Path) -> None:
    own = RuntimeDir(tmp_path / "run")
    beside_ours = f"{ENGINE.full_name}.refused"
    gone = Address(3, "b" * 32)
    for name in (f"1@{kernel_id()}.claim", f"{gone.full_name}.refused", "4.claims", beside_ours):
        (own.place / name).touch()
    with own.listen(ENGINE):
        remove_stale_files(own)
        assert sorted(os.listdir(own.place)) == sorted(["4.claims", beside_ours, ENGINE.file_name])
    remove_stale_files(own)
    assert os.listdir(own.place) == ["4.claims"]
    own.close()


def test_a_sweep_takes_names_that_an_engine_has_for_a_moment_once_they_are_old(
    tmp_path: Path,
) -> None:
    own = RuntimeDir(tmp_path / "run")
    publishing = f".{ENGINE.full_name}-26000"
    foreign = [".nfs0001", "notes.txt", ENGINE.full_name, f"{publishing}0", f"{publishing}.old"]
    for name in foreign:
        (own.place / name).touch()
    (own.place / publishing).symlink_to("nowhere")

    def age(seconds: float) -> None:
        for name in os.listdir(own.place):
            then = time.time() - seconds
            os.utime(name, (then, then), dir_fd=own.fd, follow_symlinks=False)

    age(stale_files.SECONDS - 30)
    remove_stale_files(own)
    assert sorted(os.listdir(own.place)) == sorted([publishing, *foreign])
    age(stale_files.SECONDS + 1)
    remove_stale_files(own)
    assert sorted(os.listdir(own.place)) == sorted(foreign)
    own.close()


def test_a_sweep_survives_whatever_lies_there(tmp_path: Path) -> None:
    path = tmp_path / "run"
    own = RuntimeDir(path)
    names = ["me@host", "@", "a@1.2.3.4:5", "1.claim.old", f"{kernel_id()}-1@1.2.3.4:80"]
    for name in names[:-1]:
        (path / name).mkdir()
    (path / names[-1]).symlink_to("nowhere")
    jobs = [RuntimeDir(path, job) for job in ("me@host", "a:b=c,d+e", "1-2.sock")]
    sockets = [each.listen(ENGINE) for each in jobs]
    remove_stale_files(own)
    assert [list(each.engines()) for each in jobs] == [[ENGINE]] * 3
    assert not (path / names[-1]).is_symlink()
    remove_stale_files(jobs[0])
    for sock in sockets:
        sock.close()
    for directory in (own, *jobs):
        directory.close()


def test_an_address_that_is_published_during_a_sweep_stays(tmp_path: Path) -> None:
    directory, other = RuntimeDir(tmp_path / "run"), RuntimeDir(tmp_path / "run")
    dead, live = Address(1, "d" * 32), Address(1, "e" * 32)
    stop = threading.Event()

    def sweep_always() -> None:
        while not stop.is_set():
            remove_stale_files(other)

    thread = threading.Thread(target=sweep_always)
    thread.start()
    try:
        for _ in range(200):
            directory.publish("127.0.0.1", 5000, dead)
            with directory.listen(live):
                directory.publish("127.0.0.1", 5000, live)
                assert [each.engine for each in directory.listening(5000)] == [live]
                directory.remove(live)
    finally:
        stop.set()
        thread.join()
    directory.close()
    other.close()


def test_a_relative_directory_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "run" / ".job-q").mkdir(parents=True, mode=0o700)
        (tmp_path / name / "run").chmod(0o700)
    monkeypatch.chdir(tmp_path / "one")
    directory = RuntimeDir(Path("run"), "q")
    monkeypatch.chdir(tmp_path / "two")
    directory.leave()
    assert not (tmp_path / "one" / "run" / ".job-q").exists()
    assert (tmp_path / "two" / "run" / ".job-q").exists()


@pytest.mark.parametrize("mask", [0o777, 0o277, 0o022, 0])
def test_the_umask_does_not_matter(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        directory = RuntimeDir(tmp_path / "run", "q")
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (directory.path, directory.place)] == [0o700] * 2
    directory.close()
