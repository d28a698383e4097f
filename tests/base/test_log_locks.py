"""Locks of log handlers after an exception of a signal handler (log_locks.py)."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from types import FrameType

import pytest

from datadist.base.log_locks import give_back_locks


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    parent, found = logging.getLogger("locks"), logging.getLogger("locks.child")
    handlers = [logging.StreamHandler(io.StringIO()) for _ in range(2)]
    with ExitStack() as stack:
        for each, handler in zip((parent, found), handlers, strict=True):
            each.propagate = each is found
            each.addHandler(handler)
            stack.callback(each.removeHandler, handler)
            stack.callback(setattr, each, "__class__", logging.Logger)
        yield found


def _log_interrupted(logger: logging.Logger, moment: int) -> bool:
    """Raise when the so-many-th function below the log call begins or ends; whether there was one."""
    left = moment

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal left
        left -= 1
        if left < 0 and event in ("call", "c_return"):  # where Python runs signal handlers
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        logger.warning("a record")
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


def _others_can_log(logger: logging.Logger) -> bool:
    thread = threading.Thread(target=logger.warning, args=("another record",), daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


def test_no_lock_stays_taken(logger: logging.Logger) -> None:
    give_back_locks(logger)
    logger.warning("the first")
    moment = 0
    while _log_interrupted(logger, moment):
        assert all(not handler.lock._is_owned() for handler in _handlers(logger)), moment  # type: ignore[union-attr]
        moment += 1
    assert moment > 20
    assert _others_can_log(logger)


def test_the_lock_of_the_module_does_not_stay_taken(logger: logging.Logger) -> None:
    """Python takes it where a logger is asked for a level for the first time."""
    give_back_locks(logger)
    moment = 0
    while True:
        logger.setLevel(logging.DEBUG)  # forgets what is known of levels
        if not _log_interrupted(logger, moment):
            break
        lock = logging._lock  # type: ignore[attr-defined]
        if lock._is_owned():
            lock.release()
            pytest.fail(f"taken after moment {moment}")
        moment += 1
    assert moment > 20


def _handlers(logger: logging.Logger) -> list[logging.Handler]:
    assert logger.parent is not None
    return [*logger.handlers, *logger.parent.handlers]


def test_a_lock_that_was_taken_before_stays_so(logger: logging.Logger) -> None:
    give_back_locks(logger)
    (handler,) = logger.handlers
    handler.acquire()
    try:
        assert _log_interrupted(logger, 12)
        assert handler.lock._is_owned()  # type: ignore[union-attr]
    finally:
        handler.release()
    assert _others_can_log(logger)


def test_a_class_that_the_program_chose_stays() -> None:
    class Own(logging.Logger):
        pass

    own = Own("own")
    give_back_locks(own)
    assert type(own) is Own
