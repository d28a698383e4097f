"""Where the engines of a run are: all on this host, or each on a host of its own."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from types import TracebackType

from datadist.bench.measured_engine import OWN, BenchError
from datadist.testing.far_hosts import FarHosts, FarHostsError, Host
from datadist.testing.namespace import enter

VARIABLES = ("DATADIST_RUNTIME_DIR", "DATADIST_AUTH_KEY")
HOSTS = 4


class Places:
    """Puts this process, whose engine measures, in its place; the context ends that.

    ``far`` is a kind of hosts (:mod:`datadist.testing.far_hosts`), or None: then all engines share a
    runtime directory that nobody else uses. Raises :class:`BenchError`.
    """

    def __init__(self, far: str | None) -> None:
        self._far = far
        self._undo = ExitStack()
        self.hosts: tuple[Host, ...] = ()
        """Those of the clusters in turn; none where all are on this host."""
        self.text = ""
        """What the hosts are, for people."""

    def __enter__(self) -> Places:
        try:
            self._undo.callback(_restore, {name: os.environ.get(name) for name in VARIABLES})
            if self._far is None:
                folder = tempfile.TemporaryDirectory(prefix="datadist-bench-")
                self._undo.callback(folder.cleanup)
                os.environ["DATADIST_RUNTIME_DIR"] = folder.name
            else:
                self._go_far(self._far)
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self._undo.close()

    def _go_far(self, kind: str) -> None:
        try:
            made = FarHosts(HOSTS, kind)
        except FarHostsError as error:
            raise BenchError(str(error)) from None
        self._undo.callback(made.close)
        self.hosts, self.text = tuple(made.hosts), made.describe()
        here = made.host(OWN - 1)
        if here.namespace is not None:
            home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            self._undo.callback(os.close, home)
            self._undo.callback(enter, f"/proc/self/fd/{home}")
        here.enter()
        os.environ.update(here.environ)


def _restore(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
