"""The fault matrix: what happens to one member when a fault hits the other, and how fast.

This table is what tests/faults/test_matrix.py runs, on every backend that the machine has, and what
docs/faults.md shows.
"""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = {
    "shm": "shared memory; the control connection is a Unix socket",
    "hccl": "NPUs of the simulator, connected by RDMA; the control connection is a Unix socket",
    "tcp": "faults of the control connection where it goes over TCP, as between hosts",
}
"""What the matrix is run on, as far as the machine can: the columns."""

LINK_SECONDS = 5
"""link_total_time of both members where the link is to fail; elsewhere it is longer."""
SYNC_SECONDS = 10
"""sync_kv_timeout of both members."""

FAULTS = {
    "killed": "the peer's process is killed (SIGKILL)",
    "stopped": "the peer's process is stopped (SIGSTOP), and continued later (SIGCONT)",
    "exits": "the peer's program ends without `finalize`; the interpreter exits with live links",
    "finalizes": "the peer calls `finalize`",
    "unlinks": "the peer unlinks",
    "cut": "the control connection is cut",
    "half-open": "the peer's end of the control connection stays open and is never read again",
    "garbage": "the peer sends bytes that are no message",
    "slow": "the peer sends one byte at a time, each half a millisecond after the last",
}
CONTROL = ("cut", "half-open", "garbage", "slow")
"""Faults of the control connection; the peer goes on."""
MOMENTS = {
    "before link": "we wait in link for the peer, which links after a fault of the connection",
    "preparing": "the peer is attaching our memory, and goes on after a fault of the connection",
    "idle": "the link is OK and nothing moves",
    "mid-pull": "we are pulling",
    "mid-push": "we are pushing",
    "mid-async": "a layer-wise transfer of ours is under way",
    "unlinking": "we call unlink after the fault",
    "finalizing": "we call finalize after the fault",
}


@dataclass(frozen=True)
class Cell:
    """One fault at one moment: the status (or statuses) that we see, and within how many seconds.

    ``after`` is what works once the fault is over: "relink" (with a new process or the same one),
    "same link", or "finalize" only.
    """

    fault: str
    moment: str
    status: str
    seconds: float
    after: str
    says: str = ""
    """What the error's text, or link_error, must contain: any of these, separated by " or "."""

    @property
    def name(self) -> str:
        """Name of the test."""
        return f"{self.fault} {self.moment}"


GONE = "cluster 1 is gone"
ABSENT = "has not called link or joining the peers"
LOST = "LLM_FAILED or LLM_NOT_YET_LINK"
DETECTION = 3.0
"""Bound for crowded machines; what was measured is in docs/faults.md."""
WAITED = LINK_SECONDS + 1.0
TIMED = SYNC_SECONDS + 1.0

MATRIX = [
    Cell("killed", "before link", "FAILED", WAITED, "relink", ABSENT),
    Cell("killed", "preparing", "FAILED", WAITED, "relink", "not complete after"),
    Cell("killed", "idle", "LLM_NOT_YET_LINK", DETECTION, "relink", GONE),
    Cell("killed", "mid-pull", LOST, DETECTION, "relink", "unlink"),
    Cell("killed", "mid-push", LOST, DETECTION, "relink", "unlink"),
    Cell("killed", "mid-async", LOST, DETECTION, "relink"),
    Cell("killed", "unlinking", "OK", 3.0, "relink"),
    Cell("killed", "finalizing", "OK", 5.0, "finalize"),
    Cell("stopped", "before link", "FAILED", WAITED, "relink", ABSENT),
    Cell("stopped", "preparing", "FAILED", WAITED, "relink", "not complete after"),
    Cell("stopped", "idle", "OK", DETECTION, "same link"),
    Cell("stopped", "mid-pull", "OK", TIMED, "same link"),
    Cell("stopped", "mid-push", "OK", TIMED, "same link"),
    Cell("stopped", "mid-async", "OK", TIMED, "same link"),
    Cell("stopped", "unlinking", "OK", 3.0, "relink"),
    Cell("stopped", "finalizing", "OK", 5.0, "finalize"),
    Cell("exits", "before link", "FAILED", WAITED, "relink", ABSENT),
    Cell("exits", "preparing", "FAILED", WAITED, "relink", "not complete after"),
    Cell("exits", "idle", "LLM_NOT_YET_LINK", DETECTION, "relink", "cluster 1"),
    Cell("exits", "mid-pull", LOST, DETECTION, "relink", "unlink"),
    Cell("exits", "mid-push", LOST, DETECTION, "relink", "unlink"),
    Cell("exits", "mid-async", LOST, DETECTION, "relink"),
    Cell("exits", "unlinking", "OK", 3.0, "relink"),
    Cell("exits", "finalizing", "OK", 5.0, "finalize"),
    Cell("finalizes", "before link", "FAILED", WAITED, "relink", ABSENT),
    Cell("finalizes", "preparing", "FAILED", WAITED, "relink", "not complete after"),
    Cell("finalizes", "idle", "LLM_NOT_YET_LINK", DETECTION, "relink", "cluster 1 has unlinked"),
    Cell("finalizes", "mid-pull", LOST, DETECTION, "relink", "unlink"),
    Cell("finalizes", "mid-push", LOST, DETECTION, "relink", "unlink"),
    Cell("finalizes", "mid-async", LOST, DETECTION, "relink"),
    Cell("finalizes", "unlinking", "OK", 3.0, "relink"),
    Cell("finalizes", "finalizing", "OK", 5.0, "finalize"),
    Cell("unlinks", "preparing", "FAILED", WAITED, "relink", "not complete after"),
    Cell("unlinks", "idle", "LLM_NOT_YET_LINK", DETECTION, "relink", "cluster 1 has unlinked"),
    Cell("unlinks", "mid-pull", LOST, DETECTION, "relink", "unlink"),
    Cell("unlinks", "mid-push", LOST, DETECTION, "relink", "unlink"),
    Cell("unlinks", "mid-async", LOST, DETECTION, "relink"),
    Cell("unlinks", "unlinking", "OK", 3.0, "relink"),
    Cell("unlinks", "finalizing", "OK", 5.0, "finalize"),
    Cell("cut", "before link", "OK", WAITED, "same link"),
    Cell("cut", "preparing", "OK", WAITED, "same link"),
    Cell("cut", "idle", "LLM_NOT_YET_LINK", DETECTION, "relink", GONE),
    Cell("cut", "mid-pull", LOST, DETECTION, "relink", "unlink"),
    Cell("cut", "mid-push", LOST, DETECTION, "relink", "unlink"),
    Cell("cut", "mid-async", LOST, DETECTION, "relink"),
    Cell("cut", "unlinking", "OK", 3.0, "relink"),
    Cell("cut", "finalizing", "OK", 5.0, "finalize"),
    Cell("half-open", "before link", "FAILED", WAITED, "finalize", "not complete after"),
    Cell("half-open", "preparing", "OK", WAITED, "finalize"),
    Cell("half-open", "idle", "OK", DETECTION, "finalize"),
    Cell("half-open", "mid-pull", "OK", TIMED, "finalize"),
    Cell("half-open", "mid-push", "OK", TIMED, "finalize"),
    Cell("half-open", "mid-async", "OK", TIMED, "finalize"),
    Cell("half-open", "unlinking", "OK", 3.0, "finalize"),
    Cell("half-open", "finalizing", "OK", 5.0, "finalize"),
    Cell("garbage", "before link", "OK", WAITED, "same link"),
    Cell("garbage", "preparing", "OK", WAITED, "same link"),
    Cell("garbage", "idle", "LLM_NOT_YET_LINK", DETECTION, "relink", "cluster 1 is gone: "),
    Cell("garbage", "mid-pull", LOST, DETECTION, "relink", "unlink"),
    Cell("garbage", "mid-push", LOST, DETECTION, "relink", "unlink"),
    Cell("garbage", "mid-async", LOST, DETECTION, "relink"),
    Cell("garbage", "unlinking", "OK", 3.0, "relink"),
    Cell("garbage", "finalizing", "OK", 5.0, "finalize"),
    Cell("slow", "before link", "OK", WAITED, "same link"),
    Cell("slow", "preparing", "OK", WAITED, "same link"),
    Cell("slow", "idle", "OK", DETECTION, "same link"),
    Cell("slow", "mid-pull", "OK", TIMED, "same link"),
    Cell("slow", "mid-push", "OK", TIMED, "same link"),
    Cell("slow", "mid-async", "OK", TIMED, "same link"),
    Cell("slow", "unlinking", "OK", 3.0, "relink"),
    Cell("slow", "finalizing", "OK", 5.0, "finalize"),
]

IMPOSSIBLE = {("unlinks", "before link"): "the peer has no link yet"}
"""Cells that there cannot be, and why."""


def runs_on(cell: Cell, backend: str) -> bool:
    """Whether a column has the cell."""
    return backend != "tcp" or cell.fault in CONTROL
