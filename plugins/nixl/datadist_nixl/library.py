"""The NIXL library: finding it, and agents with the calls that this transport makes of it.

An agent of NIXL has an UCX context and worker of its own. Each one here serves one peer process and
one direction: it writes to that peer, or the peer writes through it. So destroying it ends what is
under way with that peer in that direction, and nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

MODULES = ("nixl_cu12", "nixl_cu13", "nixl")
"""Where the Python API may be, by distribution; the first one found is used."""
BACKEND = "UCX"
WITHOUT_RDMA = "^ib,ib_mlx5,ib_mlx5_ext,ib_mlx5_gda,ib_mlx5_gdp,ib_efa,rdmacm"
"""Modules of UCX that are loaded: all but these."""

_environment = threading.Lock()
"""UCX reads its settings from the environment only, when it is loaded and when a context is made."""


class NixlError(Exception):
    """A call of NIXL failed; the text says which and why."""


def find() -> str | None:
    """The module of NIXL that is installed; nothing is loaded."""
    return next((name for name in MODULES if importlib.util.find_spec(name) is not None), None)


def load() -> Any:
    """Import NIXL. Raises :class:`NixlError`."""
    name = find()
    if name is None:
        raise NixlError("NIXL is not installed: pip install --no-deps nixl-cu12")
    raising = logging.raiseExceptions
    try:
        api = importlib.import_module(f"{name}._api")
        api.logger.addFilter(_quiet)
        return api
    except Exception as error:
        raise NixlError(f"NIXL cannot be imported: {error}") from error
    finally:
        logging.raiseExceptions = raising  # NIXL changes it for the whole process


class _Quiet(logging.Filter):
    """NIXL tells of each agent on standard output; not of ours."""

    making = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or not getattr(self.making, "agent", False)


_quiet = _Quiet()


@contextmanager
def _ucx_settings(transports: str) -> Iterator[None]:
    """Without the modules of RDMA where they are not used.

    On a host that has libibverbs of its own they make the process crash as it exits: its copy of
    libnl and that of NIXL's wheel are mixed up.
    """
    settings = {"UCX_TLS": transports}
    if "rc" not in transports.split(",") and "UCX_MODULES" not in os.environ:
        settings["UCX_MODULES"] = WITHOUT_RDMA
    with _environment:
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


class Kind(tuple[str, int]):
    """Memory type in NIXL's words, and device: descriptors of one request have the same."""

    __slots__ = ()


HOST = Kind(("DRAM", 0))


class Agent:
    """An agent for one peer and one direction; one thread at a time."""

    def __init__(self, api: Any, device: str, transports: str) -> None:
        self.name = secrets.token_hex(12)
        self._registered: set[Any] = set()
        config = api.nixl_agent_config(enable_prog_thread=False, backends=[])
        options = {"ucx_devices": device, "ucx_error_handling_mode": "peer"}
        _quiet.making.agent = True
        try:
            self._agent = api.nixl_agent(self.name, config)
            with _ucx_settings(transports):
                self._agent.create_backend(BACKEND, options)
        except Exception as error:
            raise NixlError(f"NIXL does not start on {device}: {_text(error)}") from error
        finally:
            _quiet.making.agent = False
        self._handles: set[Any] = set()
        self.progress = self._agent.get_new_notifs
        """Let UCX work; nobody sends notifications."""

    # -- memory ----------------------------------------------------------------------------------

    def register(self, regions: Iterable[Any]) -> list[bytes]:
        """Register those that are new; returns what a writer needs to reach these, and this agent."""
        new: dict[Kind, list[Any]] = {}
        for region in regions:
            if region not in self._registered:
                new.setdefault(region.kind, []).append(region)
        return [self._register(kind, some) for kind, some in new.items()]

    def _register(self, kind: Kind, regions: list[Any]) -> bytes:
        memory, _ = kind
        agent = self._agent
        with _calls("register memory"):
            descs = agent.get_reg_descs([_row(region) for region in regions], memory)
            agent.register_memory(descs, backends=[BACKEND])
            self._registered.update(regions)
            metadata = agent.get_partial_agent_metadata(descs, True, [BACKEND])
        return bytes(metadata)

    def deregister(self, region: Any) -> None:
        """Undo :meth:`register`, if this agent knows the region."""
        if region in self._registered:
            self._registered.discard(region)
            with _calls("deregister memory"):
                descs = self._agent.get_reg_descs([_row(region)], region.kind[0])
                self._agent.deregister_memory(descs, backends=[BACKEND])

    def load(self, metadata: bytes) -> str:
        """Know memory of another agent; returns its name."""
        with _calls("load the metadata of a peer"):
            name = self._agent.add_remote_agent(metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    # -- writing ---------------------------------------------------------------------------------

    def prepare(
        self, remote: str, source: NDArray[Any], source_memory: str,
        target: NDArray[Any], target_memory: str,
    ) -> Any:  # fmt: skip
        """A write that was not begun: rows of address, bytes, device at both ends."""
        agent = self._agent
        with _calls("prepare a write"):
            handle = agent.initialize_xfer(
                "WRITE", agent.get_xfer_descs(source, source_memory),
                agent.get_xfer_descs(target, target_memory), remote, backends=[BACKEND],
            )  # fmt: skip
        self._handles.add(handle)
        return handle

    def begin(self, handle: Any) -> bool:
        """Begin a write, or begin it again; whether it has ended already."""
        with _calls("begin a write"):
            return _ended(self._agent.transfer(handle))

    def ended(self, handle: Any) -> bool:
        """Whether every byte is in place at the peer. Raises :class:`NixlError` if it failed."""
        with _calls("write"):
            return _ended(self._agent.check_xfer_state(handle))

    def release(self, handle: Any) -> None:
        """Give up a write that has ended."""
        self._handles.discard(handle)
        with _calls("release a write"):
            handle.release()

    def close(self) -> None:
        """End everything, in some milliseconds, also with writes under way and a peer that is stopped."""
        for handle in tuple(self._handles):
            try:
                handle.release()
            except Exception as error:
                logging.getLogger("datadist.nixl").debug("a write was not released: %s", error)
        self._handles.clear()
        self._registered.clear()
        # The last references: NIXL destroys the agent. Again, where a signal handler had raised.
        self.__dict__.pop("progress", None)
        self.__dict__.pop("_agent", None)


class _calls:  # noqa: N801 - a context manager in the place of a function; a generator is slower
    """Errors of NIXL become :class:`NixlError`."""

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, NixlError):
            raise NixlError(f"NIXL could not {self._what}: {_text(error)}") from error


def _row(region: Any) -> tuple[int, int, int, str]:
    return region.address, region.size, region.kind[1], ""


def _ended(state: str) -> bool:
    if state == "ERR":
        raise NixlError("NIXL could not write: it reports an error")
    return state == "DONE"


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
