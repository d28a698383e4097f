"""Finding, loading and choosing transports; stevedore does the loading.

Names are listed from the metadata of installed distributions, without importing anything.
Stevedore's cache of entry points on disk and Python's directory caches are bypassed. They compare
coarse file times, so that a newly installed plugin could stay invisible.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata

from datadist.base.shortage import explain, is_shortage
from datadist.transport import API_VERSION, ENTRY_POINT_GROUP, Availability, Combining, Transport
from datadist.transports.combined import SEPARATOR, CombinedTransport, combine, why_not
from datadist.transports.plugin_metadata import (
    Backend,
    BrokenMetadata,
    Installed,
    named_directly,
    scan,
)

__all__ = [
    "Backend",
    "BackendError",
    "BackendState",
    "Choice",
    "choose_backend",
    "list_backends",
    "list_states",
]

log = logging.getLogger("datadist.backend")

ENVIRONMENT = "DATADIST_BACKEND"
KEY = "DATADIST_AUTH_KEY"
"""Set where engines may meet over the network."""
KNOWN = {
    "hccl": "datadist-hccl", "nixl": "datadist-nixl", "rdma": "datadist-rdma", "shm": "datadist-shm"
}  # fmt: skip
"""Distributions of this project's own transports, for hints."""
REPAIR = (
    "Install that package again, or remove what is left of it; transports that it has are not found"
)
_reported: set[BrokenMetadata] = set()
"""Damaged metadata that this process has logged."""


class BackendError(Exception):
    """No transport could be chosen or loaded; the text says why and names the alternatives."""


@dataclass(frozen=True)
class Choice:
    """The transport to use, and why."""

    backend: Backend
    transport_class: type[Transport]
    why_this: str
    passed_over: tuple[str, ...] = ()
    """Why each of those that come before it is not used."""

    @property
    def why(self) -> str:
        """All of the reasons."""
        return "; ".join([self.why_this, *self.passed_over])

    @property
    def name(self) -> str:
        """Name of the backend."""
        return self.backend.name

    @property
    def parts(self) -> list[tuple[str, type[Transport]]]:
        """The transports that it is made of, with their names: itself, or two."""
        if issubclass(self.transport_class, CombinedTransport):
            both = self.transport_class.near, self.transport_class.far
            return [(part.name, part.transport_class) for part in both]
        return [(self.name, self.transport_class)]


@dataclass(frozen=True)
class BackendState:
    """An installed backend and whether it can be used."""

    backend: Backend
    usable: bool
    reason: str
    priority: int | None
    """None where the plugin could not be loaded."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Descriptions of its options by name."""


def list_backends() -> list[Backend]:
    """Every installed transport by name, without importing any of them."""
    return list(_installed().backends)


def _installed() -> Installed:
    """What is installed now; damaged metadata is logged, once in a process."""
    found = scan()
    for broken in found.broken:
        if broken not in _reported and log.isEnabledFor(logging.WARNING):
            _reported.add(broken)
            log.warning("skipped: %s. %s", broken, REPAIR)
    return found


def load_transport(name: str) -> tuple[Backend, type[Transport]]:
    """The entry point of that name, or ``module:Class``, and its class; or ``near+far``, of two.

    Raises :class:`BackendError` when it is not installed, is installed twice, cannot be imported,
    is no transport or was written for another version of the interface; and for two that cannot be
    combined.
    """
    return _load(name, _installed())


def _load(name: str, installed: Installed) -> tuple[Backend, type[Transport]]:
    if SEPARATOR in name:
        return _load_two(name, installed)
    backend = _only(name, installed)
    loaded = _import(backend)
    if not (isinstance(loaded, type) and issubclass(loaded, Transport)):
        raise BackendError(
            f"backend {backend}: {backend.target} is {loaded!r}, expected a class derived from "
            "datadist.transport.Transport"
        )
    _check_class(backend, loaded)
    return backend, loaded


def _load_two(name: str, installed: Installed) -> tuple[Backend, type[Transport]]:
    names = [each.strip() for each in name.split(SEPARATOR)]
    if len(names) != 2 or not all(names) or "auto" in names:
        raise BackendError(
            f"backend {name!r}: expected the names of two transports as in shm{SEPARATOR}rdma, the "
            "first for peers on this host and the second for all others"
        )
    return _combined(*(_load(each, installed) for each in names))


def _combined(
    near: tuple[Backend, type[Transport]], far: tuple[Backend, type[Transport]]
) -> tuple[Backend, type[Transport]]:
    names = near[0].name, far[0].name
    reason = why_not(names[0], near[1], names[1], far[1])
    if reason:
        raise BackendError(f"backend {SEPARATOR.join(names)}: {reason}")
    backend = Backend(
        *(SEPARATOR.join(pair) for pair in (
            names,
            (near[0].distribution, far[0].distribution),
            (near[0].version, far[0].version),
            (near[0].target, far[0].target),
        ))
    )  # fmt: skip
    return backend, combine(names[0], near[1], names[1], far[1])


def _check_class(backend: Backend, loaded: type[Transport]) -> None:
    version = getattr(loaded, "api_version", None)
    if version != API_VERSION:
        raise BackendError(
            f"backend {backend} was written for version {version} of the transport interface, this "
            f"datadist has version {API_VERSION}: {_remedy(version, backend)}"
        )
    missing = ", ".join(sorted(loaded.__abstractmethods__))
    if missing:
        raise BackendError(
            f"backend {backend}: {backend.target} is not complete, it lacks {missing}; report that "
            f"to the author of {backend.distribution}"
        )
    if not isinstance(loaded.priority, int):
        raise BackendError(
            f"backend {backend}: its priority is {loaded.priority!r}, expected a number; report "
            f"that to the author of {backend.distribution}"
        )


def _remedy(version: object, backend: Backend) -> str:
    if isinstance(version, int) and version > API_VERSION:
        return "`pip install --upgrade datadist`"
    if isinstance(version, int):
        return f"`pip install --upgrade {backend.distribution}`"
    return f"its class must set api_version; report that to the author of {backend.distribution}"


def choose_backend(requested: str | None, environ: Mapping[str, str]) -> Choice:
    """The transport that was asked for, or the usable one of highest priority.

    ``requested`` (the option transfer_backend) comes before ``DATADIST_BACKEND``; neither, or
    "auto", means any. There is no fallback from a name. ``module:Class`` names a class that no
    metadata of an installed distribution lists. ``near+far`` names two: see
    :mod:`datadist.transports.combined`. Where engines may meet over the network, "auto" combines two
    that are usable and made for it (:class:`Combining`), unless another one has a higher priority.

    Raises :class:`BackendError`; and what the system refuses for want of a resource, as it is.
    """
    name, origin = _wanted(requested, environ)
    installed = _installed()
    networked = bool(environ.get(KEY))
    choice = _best(installed, networked) if name == "auto" else _named(name, origin, installed)
    log.info("backend %s: %s", choice.backend, choice.why)
    return choice


def list_states() -> list[BackendState]:
    """Every installed transport with its state, in the order in which `auto` tries them."""
    installed = _installed()
    rows = []
    for name in _unique_names(installed):
        try:
            backend, loaded = _load(name, installed)
        except BackendError as error:
            rows += [
                BackendState(b, False, str(error), None)
                for b in installed.backends
                if b.name == name
            ]
        else:
            state = _probe_in_words(backend, loaded)
            rows.append(
                BackendState(
                    backend, state.usable, state.reason, loaded.priority, loaded.options or {}
                )
            )
    return sorted(rows, key=_order)


def wanted(environ: Mapping[str, str]) -> tuple[str, str]:
    """The backend of an engine without transfer_backend, and where it is set."""
    return _wanted(None, environ)


def _wanted(requested: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    if requested:
        return requested, "transfer_backend"
    if environ.get(ENVIRONMENT):
        return environ[ENVIRONMENT], ENVIRONMENT
    return "auto", "default"


def _order(row: BackendState) -> tuple[int, str]:
    return (-(row.priority if row.priority is not None else -1), row.backend.name)


def _unique_names(installed: Installed) -> list[str]:
    return sorted({backend.name for backend in installed.backends})


def _only(name: str, installed: Installed) -> Backend:
    direct = named_directly(name)
    if direct is not None:
        return direct
    found = [backend for backend in installed.backends if backend.name == name]
    if not found:
        raise BackendError(
            f"backend {name!r} is not installed. {_hint(name, installed)}{_others(name, installed)}"
            f"{_damage(installed)}"
        )
    if len(found) > 1:
        owners = " and ".join(f"{b.distribution} {b.version}" for b in found)
        raise BackendError(
            f"backend {name!r} is provided by {owners}: uninstall all but one of them"
        )
    return found[0]


def _hint(name: str, installed: Installed) -> str:
    """A hint for a user who asked for a transport that is not installed."""
    if name in KNOWN:
        return f"{_without_metadata([name])}Install {how_to_get(name)}. "
    names = [*KNOWN, *(backend.name for backend in installed.backends)]
    near = difflib.get_close_matches(name, names, 1)
    return f"Did you mean {near[0]!r}? " if near else ""


def _without_metadata(names: Iterable[str]) -> str:
    """How to use transports of this project that can be imported, but that no metadata lists."""
    here = [name for name in names if importlib.util.find_spec(f"datadist_{name}") is not None]
    targets = " or ".join(f"datadist_{name}:{name.capitalize()}Transport" for name in here)
    if not here:
        return ""
    return (
        f"{' and '.join(f'datadist_{name}' for name in here)} can be imported, but the metadata of no "
        "installed package lists it (a source tree on PYTHONPATH, a frozen program or an archive "
        f"without .dist-info): name its class, transfer_backend or {ENVIRONMENT} = {targets}. "
    )


def _damage(installed: Installed) -> str:
    """Damaged metadata, which may be that of the transport that is missing."""
    texts = "; ".join(map(str, installed.broken))
    return f". Also, {texts}. {REPAIR}" if texts else ""


def how_to_get(name: str) -> str:
    """A transport of this project, and the commands that install it."""
    wanted = KNOWN[name]
    return (
        f"{wanted}: `pip install ./plugins/{name}` in a checkout of datadist, or "
        f"`pip install {wanted}` where your package index has it"
    )


def how_to_begin() -> str:
    """What to do where no transport is installed."""
    return (
        f"{_without_metadata(KNOWN)}For one host install {how_to_get('shm')}; datadist-rdma is for "
        "RoCE, datadist-hccl for Ascend NPUs"
    )


def _others(name: str, installed: Installed) -> str:
    others = [str(backend) for backend in installed.backends if backend.name != name]
    if others:
        return f"Installed: {', '.join(others)}; `datadist backends` says which are usable"
    return f"No other transport is installed; for one host install {how_to_get('shm')}"


def _import(backend: Backend) -> object:
    from stevedore.driver import DriverManager

    try:
        return _UncachedDriverManager()(DriverManager, backend)
    except Exception as error:
        raise BackendError(
            f"backend {backend} cannot be imported: {type(error).__name__}: {error}. "
            f"{_import_hint(backend, error)}"
        ) from error


def _import_hint(backend: Backend, error: Exception) -> str:
    module = backend.module
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and missing.partition(".")[0] == module.partition(".")[0]:
        if named_directly(backend.distribution) is not None:
            return f"No folder of sys.path has {missing}: correct the name, or set PYTHONPATH"
        return (
            f"The files of {backend.distribution} are not where its metadata says: "
            f"`pip install --force-reinstall {backend.distribution}`, and start this program again "
            "if it was installed in the meantime"
        )
    if missing:
        return f"The module {missing} is missing, which {backend.distribution} needs: install it"
    return f"`python -c 'import {module}'` shows where"


class _UncachedDriverManager:
    """Builds a stevedore manager that knows one entry point only, and returns its driver."""

    def __call__(self, manager_class: type, backend: Backend) -> object:
        def list_entry_points(_manager: object) -> list[metadata.EntryPoint]:
            return [metadata.EntryPoint(backend.name, backend.target, ENTRY_POINT_GROUP)]

        uncached = type(
            "UncachedDriverManager", (manager_class,), {"list_entry_points": list_entry_points}
        )
        manager = uncached(
            ENTRY_POINT_GROUP,
            backend.name,
            invoke_on_load=False,
            on_load_failure_callback=_raise,
        )
        return manager.driver


def _raise(_manager: object, _entry_point: object, error: Exception) -> None:
    raise error


def _probe(backend: Backend, loaded: type[Transport]) -> Availability:
    try:
        return loaded.probe()
    except Exception as error:
        if is_shortage(error):
            raise
        log.warning(
            "defect of backend %s: its probe raised %s: %s", backend, type(error).__name__, error
        )
        return Availability(False, f"its probe raised {type(error).__name__}: {error}")


def _probe_in_words(backend: Backend, loaded: type[Transport]) -> Availability:
    try:
        return _probe(backend, loaded)
    except Exception as error:
        return Availability(False, f"it cannot be tried now: {explain(error)}")


def _named(name: str, origin: str, installed: Installed) -> Choice:
    backend, loaded = _load(name, installed)
    state = _probe(backend, loaded)
    if not state.usable:
        raise BackendError(
            f"backend {backend} (from {origin}) cannot be used here: {state.reason}. "
            f"{_others(name, installed)}"
        )
    return Choice(backend, loaded, f"named by {origin}; {state.reason}")


def _best(installed: Installed, networked: bool) -> Choice:
    passed_over: list[str] = []
    usable: list[tuple[Backend, type[Transport], str]] = []
    for backend, loaded in _candidates(installed, passed_over):
        state = _probe(backend, loaded)
        if state.usable:
            usable.append((backend, loaded, state.reason))
            if not networked:
                break
        else:
            passed_over.append(f"{backend} is not: {state.reason}")
    if usable:
        return _best_two(usable) or _best_one(usable, passed_over)
    if not passed_over:
        raise BackendError(f"no transport is installed: {how_to_begin()}{_damage(installed)}")
    raise BackendError("no installed transport is usable here: " + "; ".join(passed_over))


def _best_one(usable: list[tuple[Backend, type[Transport], str]], passed_over: list[str]) -> Choice:
    backend, loaded, reason = usable[0]
    why = f"highest priority ({loaded.priority}) of what is usable; {reason}"
    return Choice(backend, loaded, why, tuple(passed_over))


def _best_two(usable: list[tuple[Backend, type[Transport], str]]) -> Choice | None:
    """One for peers on this host and one for the others, if both are there and come first."""
    if usable[0][1].combining not in (Combining.NEAR, Combining.FAR):
        return None
    found = []
    for place in (Combining.NEAR, Combining.FAR):
        first = next((each for each in usable if each[1].combining is place), None)
        if first is None:
            return None
        found.append(first)
    near, far = found
    backend, loaded = _combined(near[:2], far[:2])
    why = (
        f"{KEY} is set, so peers may be on other hosts: {near[0].name} for this host ({near[2]}), "
        f"{far[0].name} for the others ({far[2]})"
    )
    return Choice(backend, loaded, why)


def _candidates(
    installed: Installed, passed_over: list[str]
) -> Iterator[tuple[Backend, type[Transport]]]:
    """Loadable transports by descending priority; broken ones are logged and skipped."""
    loaded = []
    for name in _unique_names(installed):
        try:
            loaded.append(_load(name, installed))
        except BackendError as error:
            log.warning("skipped: %s", error)
            passed_over.append(str(error))
    yield from sorted(loaded, key=lambda item: (-item[1].priority, item[0].name))
