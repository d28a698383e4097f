"""Ways to move blocks between two processes of one host, behind one small interface.

A contender is a module-level class pair: an owner, which holds memory, and a mover, which reads from it,
or writes to it where the tuning has the direction ``push``. The source is filled, the target zero. Each
lives in a process of its own, which is started with the contender's environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LARGE = ("contiguous", "paged-gqa", "paged-mla")


@dataclass(frozen=True)
class Contender:
    """A way with one tuning; ``owner`` and ``mover`` are "module:Class"."""

    name: str
    owner: str
    mover: str
    environ: Mapping[str, str] = field(default_factory=dict)
    tuning: Mapping[str, str] = field(default_factory=dict)
    workloads: frozenset[str] = frozenset({*LARGE, "latency", "push", "link"})


def _nixl(name: str, environ: Mapping[str, str], **tuning: str) -> Contender:
    here = "contenders.nixl_ucx"
    return Contender(name, f"{here}:NixlOwner", f"{here}:NixlMover", environ, tuning)


def _ours(name: str, **tuning: str) -> Contender:
    here = "contenders.this_library"
    return Contender(name, f"{here}:Owner", f"{here}:Mover", {}, tuning)


CONTENDERS = [
    _ours("datadist pool"),
    _ours("datadist empty", memory="empty"),
    _ours("datadist registered", memory="registered"),
    _nixl("nixl default", {}, progress="1"),
    _nixl("nixl no thread", {}, progress="0"),
    _nixl(
        "nixl tuned",
        {"UCX_TLS": "self,sysv,posix,cma", "UCX_RNDV_SCHEME": "get_zcopy"},
        progress="0",
        errors="none",
    ),
    _ours("datadist over nixl, tcp", backend="nixl"),
    _nixl("nixl tcp", {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}, progress="0", poll="0"),
    Contender(
        "mooncake tcp", "contenders.mooncake_tcp:Owner", "contenders.mooncake_tcp:Mover",
        {"MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "2"},
        workloads=frozenset({*LARGE, "latency", "link"}),
    ),
    Contender(
        "by hand", "contenders.by_hand:Owner", "contenders.by_hand:Mover",
        workloads=frozenset({*LARGE, "latency"}),
    ),
]  # fmt: skip
