"""Failures to find, load and choose a transport, each with a message that ends the search."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from datadist.testing import installed
from datadist.testing.installing import write_metadata
from datadist.transports.loader import (
    KNOWN,
    BackendError,
    choose_backend,
    list_backends,
    list_states,
    load_transport,
    wanted,
)
from datadist.transports.plugin_metadata import Installed

GOOD = "from datadist.testing.reference import ReferenceTransport\n"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What installs for one test."""
    with ExitStack() as stack:
        yield stack


def _install(stack: ExitStack, name: str, body: str, distribution: str = "acme") -> Path:
    """A distribution whose module has ``body`` and defines the class Acme."""
    module = f"module_of_{name}"
    folder = stack.enter_context(
        installed({name: f"{module}:Acme"}, distribution=distribution, version="1.2")
    )
    (folder / f"{module}.py").write_text(body)
    stack.callback(sys.modules.pop, module, None)
    return folder


def _message(name: str) -> str:
    with pytest.raises(BackendError) as caught:
        choose_backend(name, {})
    return str(caught.value)


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN, "elsewhere", "datadist-elsewhere")
    text = _message("elsewhere")
    assert "is not installed. Install datadist-elsewhere: `pip install ./plugins/elsewhere`" in text
    assert "or `pip install datadist-elsewhere` where your package index has it" in text
    assert "Installed: " in text
    assert "shm (datadist-shm" in text


def test_a_name_that_was_mistyped() -> None:
    assert "Did you mean 'shm'?" in _message("shmm")
    assert "Did you mean" not in _message("nonsense")


def test_two_distributions_claim_a_name(stack: ExitStack) -> None:
    _install(stack, "twice", GOOD, distribution="acme")
    _install(stack, "twice", GOOD, distribution="other")
    assert "'twice' is provided by acme 1.2 and other 1.2: uninstall all but one" in _message(
        "twice"
    )


def test_an_import_error_inside_the_plugin(stack: ExitStack) -> None:
    _install(stack, "broken", "import nothing_of_that_name\n")
    text = _message("broken")
    assert "backend broken (acme 1.2) cannot be imported: ModuleNotFoundError" in text
    assert "The module nothing_of_that_name is missing, which acme needs" in text


def test_a_library_that_is_missing(stack: ExitStack) -> None:
    _install(stack, "unlinked", "import ctypes; ctypes.CDLL('libnowhere.so.7')\n")
    text = _message("unlinked")
    assert "OSError: libnowhere.so.7" in text
    assert "`python -c 'import module_of_unlinked'` shows where" in text


def test_files_that_are_gone(stack: ExitStack) -> None:
    stack.enter_context(installed({"ghost": "ghost_module:Ghost"}, distribution="acme"))
    text = _message("ghost")
    assert "pip install --force-reinstall acme" in text


def test_an_attribute_that_is_missing(stack: ExitStack) -> None:
    _install(stack, "renamed", "class Other: pass\n")
    text = _message("renamed")
    assert "cannot be imported: AttributeError" in text
    assert "'Acme'" in text


@pytest.mark.parametrize(
    ("version", "remedy"),
    [("3", "pip install --upgrade datadist`"), ("1", "pip install --upgrade acme`"),
     ("'1'", "its class must set api_version")],
)  # fmt: skip
def test_another_version_of_the_interface(stack: ExitStack, version: str, remedy: str) -> None:
    body = f"{GOOD}class Acme(ReferenceTransport):\n    api_version = {version}\n"
    _install(stack, "versioned", body)
    text = _message("versioned")
    assert f"written for version {version.strip(chr(39))} of the transport interface" in text
    assert "this datadist has version 2" in text
    assert remedy in text


@pytest.mark.parametrize("body", ["def Acme(options): pass\n", "class Acme: pass\n", "Acme = 7\n"])
def test_something_of_another_kind(stack: ExitStack, body: str) -> None:
    _install(stack, "kind", body)
    text = _message("kind")
    assert "module_of_kind:Acme is " in text
    assert "expected a class derived from datadist.transport.Transport" in text


def test_a_class_that_is_not_complete(stack: ExitStack) -> None:
    body = "from datadist.transport import Transport\nclass Acme(Transport):\n    api_version = 2\n"
    _install(stack, "partial", body)
    text = _message("partial")
    assert "is not complete, it lacks __init__, allocate, capabilities, close, open" in text


def test_a_priority_that_is_no_number(stack: ExitStack) -> None:
    _install(stack, "proud", f"{GOOD}class Acme(ReferenceTransport):\n    priority = 'high'\n")
    assert "its priority is 'high', expected a number" in _message("proud")


def test_unavailable_here(stack: ExitStack) -> None:
    body = (
        f"{GOOD}from datadist.transport import Availability, Combining\n"
        "class Acme(ReferenceTransport):\n"
        "    @classmethod\n"
        "    def probe(cls):\n"
        "        return Availability(False, 'no device in /dev/acme')\n"
    )
    _install(stack, "absent", body)
    text = _message("absent")
    assert "absent (acme 1.2) (from transfer_backend) cannot be used here" in text
    assert "no device in /dev/acme" in text
    assert "Installed: shm" in text or ", shm (" in text
    with pytest.raises(BackendError, match="from DATADIST_BACKEND"):
        choose_backend(None, {"DATADIST_BACKEND": "absent"})


def test_a_probe_that_raises(stack: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    body = (
        f"{GOOD}class Acme(ReferenceTransport):\n"
        "    @classmethod\n"
        "    def probe(cls):\n"
        "        raise PermissionError('/dev/acme')\n"
    )
    _install(stack, "jumpy", body)
    with caplog.at_level(logging.WARNING, "datadist.backend"):
        assert "its probe raised PermissionError: /dev/acme" in _message("jumpy")
    assert "defect of backend jumpy (acme 1.2)" in caplog.text


def test_broken_ones_do_not_keep_auto_from_choosing(
    stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    _install(stack, "broken", "raise RuntimeError('no')\n")
    with caplog.at_level(logging.WARNING, "datadist.backend"):
        choice = choose_backend("auto", {})
    assert choice.name != "broken"
    assert "broken (acme 1.2) cannot be imported: RuntimeError: no" in choice.why
    assert "skipped: backend broken" in caplog.text
    row = next(row for row in list_states() if row.backend.name == "broken")
    assert (row.usable, row.priority) == (False, None)


def _rival(
    stack: ExitStack, name: str, priority: int, usable: bool = True, combining: str = "NAMED"
) -> None:
    """A transport of that priority, which may be unusable here."""
    _install(
        stack, name,
        f"{GOOD}from datadist.transport import Availability, Combining\n"
        "class Acme(ReferenceTransport):\n"
        f"    priority = {priority}\n"
        f"    combining = Combining.{combining}\n"
        "    @classmethod\n"
        "    def probe(cls):\n"
        f"        return Availability({usable}, 'state of {name}')\n",
        distribution=f"dist-{name}",
    )  # fmt: skip


HIGH = 1 << 20
"""Above every transport that may be installed."""


@pytest.mark.parametrize("requested", ["auto", None, ""])
def test_auto_takes_the_highest_priority_that_is_usable(
    stack: ExitStack, requested: str | None
) -> None:
    _rival(stack, "a_low", HIGH)
    _rival(stack, "z_high", HIGH + 2)
    _rival(stack, "m_middle", HIGH + 1)
    _rival(stack, "b_absent", HIGH + 3, usable=False)
    choice = choose_backend(requested, {})
    assert choice.name == "z_high"
    assert f"highest priority ({HIGH + 2}) of what is usable; state of z_high" in choice.why
    assert "b_absent (dist-b_absent 1.2) is not: state of b_absent" in choice.why
    assert "m_middle" not in choice.why
    order = [row.backend.name for row in list_states()]
    assert order[:4] == ["b_absent", "z_high", "m_middle", "a_low"]
    assert [row.usable for row in list_states()][:4] == [False, True, True, True]


def test_of_equal_priorities_the_first_name_is_taken(stack: ExitStack) -> None:
    for name in ("second", "first", "third"):
        _rival(stack, name, HIGH)
    assert choose_backend(None, {}).name == "first"
    assert [row.backend.name for row in list_states()][:3] == ["first", "second", "third"]


def test_nothing_that_is_usable(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    _rival(stack, "b_absent", HIGH, usable=False)
    _rival(stack, "a_absent", HIGH + 1, usable=False)
    only = tuple(each for each in list_backends() if each.name.endswith("_absent"))
    monkeypatch.setattr("datadist.transports.loader.scan", lambda: Installed(only, ()))
    with pytest.raises(
        BackendError, match="no installed transport is usable here: a_absent"
    ) as got:
        choose_backend(None, {})
    assert str(got.value).endswith("b_absent (dist-b_absent 1.2) is not: state of b_absent")


def test_the_option_comes_before_the_environment(stack: ExitStack) -> None:
    for number, name in enumerate(("highest", "chosen", "other")):
        _rival(stack, name, HIGH - number)
    environ = {"DATADIST_BACKEND": "other"}
    chosen = choose_backend("chosen", environ)
    assert (chosen.name, chosen.why) == ("chosen", "named by transfer_backend; state of chosen")
    assert choose_backend("auto", environ).name == "highest"
    for nothing in (None, ""):
        other = choose_backend(nothing, environ)
        assert (other.name, other.why) == ("other", "named by DATADIST_BACKEND; state of other")
        assert choose_backend(nothing, {"DATADIST_BACKEND": ""}).name == "highest"
        assert choose_backend(nothing, {"DATADIST_BACKEND": "auto"}).name == "highest"
    assert wanted(environ) == ("other", "DATADIST_BACKEND")
    assert wanted({}) == ("auto", "default")
    with pytest.raises(BackendError, match="'nowhere' is not installed"):
        choose_backend("nowhere", environ)
    with pytest.raises(BackendError, match="'nowhere' is not installed"):
        choose_backend(None, {"DATADIST_BACKEND": "nowhere"})


def test_a_plugin_installed_a_second_ago_is_found_by_a_running_program(stack: ExitStack) -> None:
    folder = _install(stack, "first", f"{GOOD}Acme = ReferenceTransport\n")
    load_transport("first")
    before = folder.stat()
    with pytest.raises(BackendError):
        load_transport("second")
    (folder / "module_of_second.py").write_text(f"{GOOD}Acme = ReferenceTransport\n")
    write_metadata(folder, {"second": "module_of_second:Acme"}, "late", "0.1")
    stack.callback(sys.modules.pop, "module_of_second", None)
    # As on file systems that keep times in seconds.
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_transport("second")[0].distribution == "late"


def test_a_user_sees_the_message(stack: ExitStack) -> None:
    folder = _install(stack, "broken", "import nothing_of_that_name\n")
    assert "LLMException: backend broken (acme 1.2) cannot be imported" in _init(folder, "broken")


def test_a_start_that_raises_is_a_defect_of_the_plugin(stack: ExitStack) -> None:
    body = (
        f"{GOOD}class Acme(ReferenceTransport):\n"
        "    def __init__(self, options):\n"
        "        raise KeyError('ACME_HOME')\n"
    )
    text = _init(_install(stack, "hasty", body), "hasty")
    assert "LLMException: backend hasty (acme 1.2) does not start: KeyError: 'ACME_HOME'" in text


# -- two together --------------------------------------------------------------------------------


def _two(stack: ExitStack, **usable: bool) -> None:
    """One that is made for peers on this host, and two for the others."""
    for number, (name, place) in enumerate(
        (("b_far", "FAR"), ("c_near", "NEAR"), ("d_far", "FAR"))
    ):
        _rival(stack, name, HIGH - number, usable.get(name, True), place)


NETWORKED = {"DATADIST_AUTH_KEY": "a key"}


def test_two_are_named_as_one(stack: ExitStack) -> None:
    _two(stack)
    choice = choose_backend("c_near+d_far", {})
    assert choice.name == "c_near+d_far"
    assert [name for name, _ in choice.parts] == ["c_near", "d_far"]
    assert str(choice.backend) == "c_near+d_far (dist-c_near+dist-d_far 1.2+1.2)"
    assert "c_near: state of c_near; d_far: state of d_far" in choice.why
    assert choose_backend(" d_far + c_near", {}).name == "d_far+c_near"
    assert choose_backend(None, {"DATADIST_BACKEND": "c_near+b_far"}).name == "c_near+b_far"


@pytest.mark.parametrize("name", ["a+b+c", "+b", "a+", "+", "auto+d_far", "c_near+auto"])
def test_a_wrong_name_of_two(name: str) -> None:
    assert "expected the names of two transports as in shm+rdma, the first for peers on this" in (
        _message(name)
    )


def test_why_two_cannot_be_used(stack: ExitStack) -> None:
    _two(stack, d_far=False)
    _rival(stack, "whole", 1, combining="NEVER")
    assert "'nowhere' is not installed" in _message("c_near+nowhere")
    assert "c_near is named twice: name it alone" in _message("c_near+c_near")
    assert "whole links all members of a domain, or none" in _message("c_near+whole")
    assert "cannot be used here: d_far: state of d_far" in _message("c_near+d_far")


def test_auto_combines_two_where_engines_may_meet_over_the_network(stack: ExitStack) -> None:
    _two(stack)
    assert choose_backend(None, {}).name == "b_far"
    choice = choose_backend("auto", NETWORKED)
    assert choice.name == "c_near+b_far"
    assert "DATADIST_AUTH_KEY is set, so peers may be on other hosts: c_near for this" in choice.why
    assert choose_backend(None, {"DATADIST_AUTH_KEY": ""}).name == "b_far"


def test_auto_combines_only_what_is_usable(stack: ExitStack) -> None:
    _two(stack, b_far=False)
    assert choose_backend(None, NETWORKED).name == "c_near+d_far"


def test_auto_does_not_combine_what_comes_after_another_one(stack: ExitStack) -> None:
    _two(stack)
    _rival(stack, "a_better", HIGH + 1)
    assert choose_backend(None, NETWORKED).name == "a_better"


@pytest.mark.parametrize("place", ["NAMED", "NEVER"])
def test_auto_combines_only_what_is_made_for_it(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    _rival(stack, "a_near", HIGH, combining="NEAR")
    _rival(stack, "b_other", HIGH - 1, combining=place)
    only = tuple(each for each in list_backends() if each.name in ("a_near", "b_other"))
    monkeypatch.setattr("datadist.transports.loader.scan", lambda: Installed(only, ()))
    assert choose_backend(None, NETWORKED).name == "a_near"


def _init(folder: Path, backend: str) -> str:
    """The last line that a program prints whose init fails."""
    code = (
        "from datadist import *\n"
        "config = LLMConfig()\n"
        "config.enable_cache_manager = True\n"
        f"config.transfer_backend = '{backend}'\n"
        "LLMDataDist(LLMRole.MIX, 1).init(config.generate_options())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    return done.stderr.strip().splitlines()[-1]
