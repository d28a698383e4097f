"""Whether gevent or eventlet have replaced functions that engines need as Python has them.

An engine has threads that serve peers while the program computes, and waits for them with locks. With
greenlets in place of threads nothing runs while the program computes, and a wait never ends.
"""

from __future__ import annotations

import sys

__all__ = ["REMEDY", "patched"]

LIBRARIES = ("gevent", "eventlet")
NEEDED = (
    ("_thread", "start_new_thread"),
    ("threading", "Lock"),
    ("threading", "Event"),
    ("threading", "get_ident"),
    ("select", "select"),
    ("socket", "socket"),
    ("queue", "SimpleQueue"),
    ("time", "sleep"),
)
REMEDY = (
    "run the engine in a process of its own that does not patch (start it with subprocess, not by "
    "fork), or leave these modules out: eventlet.monkey_patch(thread=False, socket=False, select=False, "
    "time=False), gevent.monkey.patch_all(thread=False, socket=False, select=False, time=False, "
    "queue=False, event=False)"
)


def patched() -> str:
    """The replaced functions and who has replaced them, in words; empty if there are none."""
    if sys.modules.keys().isdisjoint(LIBRARIES):
        return ""
    found: dict[str, list[str]] = {}
    for module, name in NEEDED:
        present = getattr(sys.modules.get(module), name, None)
        source = getattr(present, "__module__", None) or ""
        library = source.partition(".")[0]
        if library in LIBRARIES:
            found.setdefault(library, []).append(f"{module}.{name}")
    return "; ".join(
        f"{library} has replaced {', '.join(names)}" for library, names in found.items()
    )
