"""Overlap pulls in a program with threads: `python overlap_threads.py`.

Its worker thread computes while pulls go on, and takes requests as they come.
"""

from __future__ import annotations

from queue import SimpleQueue

from overlap_world import PULLS, World, world


def pull_all(here: World) -> None:
    """Begin all pulls; callbacks put each request that has come into the queue of this thread."""
    arrived: SimpleQueue[int] = SimpleQueue()
    tasks = []
    for number in range(PULLS):
        key, source, target = here.request(number)
        task = here.manager.pull_blocks_async(key, here.cache, source, target)
        task.add_done_callback(lambda _, number=number: arrived.put(number))  # type: ignore[misc]
        tasks.append(task)
    for _ in range(PULLS):
        tasks[arrived.get()].result()  # raises if it failed


def main() -> None:
    """Both ways, several times: the first pull of a key takes longer."""
    with world() as here:
        for _ in range(3):
            here.timed("one after another", here.one_after_another)
            here.timed("threads", lambda: pull_all(here))


if __name__ == "__main__":
    main()
