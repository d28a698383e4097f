"""What tests may catch."""

from __future__ import annotations


class WorkerError(Exception):
    """A worker could not do what was asked; the text says why."""


class WorkerTimeout(WorkerError, TimeoutError):
    """A function did not end by its deadline. The worker was killed; the text has its stacks."""


class WorkerEnded(WorkerError):
    """The process of a worker has ended; the text has its last lines of stderr."""


class LeftBehind(UserWarning):
    """What a test left behind, where the option ``datadist_leftovers`` is ``warn``."""


class RemoteTraceback(Exception):
    """The cause of an exception that came from a worker: its text is the traceback from there."""

    def __init__(self, worker: str, text: str) -> None:
        super().__init__(worker, text)

    def __str__(self) -> str:
        worker, text = self.args
        return f"\nin {worker}:\n{text}"
