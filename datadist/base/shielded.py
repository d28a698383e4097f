"""Starting processes that Ctrl-C does not reach: whoever started them ends them.

A terminal sends SIGINT to all processes of a command. Each would print a traceback of its own.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing import resource_tracker


def start_shielded(start: Callable[[], None]) -> None:
    """Call ``start``, whose new processes have SIGINT blocked; here it comes when that has returned.

    ``start`` keeps what it has started, since an interrupt is raised right after it.
    """
    # Starting the tracker would unblock the signal in the middle of it.
    resource_tracker.ensure_running()  # type: ignore[attr-defined,unused-ignore]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
