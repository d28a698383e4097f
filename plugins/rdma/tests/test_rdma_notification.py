"""What a device's thread sets and a transfer waits for (notification.py)."""

from __future__ import annotations

import threading

from datadist_rdma.notification import Notification

from tests.interrupts import raising


def test_it_is_set_once_for_one_wait() -> None:
    notification = Notification()
    assert not notification.wait(0)
    notification.set()
    notification.set()
    assert notification.wait(60)
    assert not notification.wait(0)
    notification.set()
    notification.clear()
    notification.clear()
    assert not notification.wait(0)


def test_who_waits_is_woken() -> None:
    notification, woken = Notification(), threading.Event()

    def wait() -> None:
        if notification.wait(60):
            woken.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    notification.set()
    waiting.join(60)
    assert woken.is_set()


def test_a_handler_that_raises_leaves_nothing_that_the_thread_of_the_device_waits_for() -> None:
    notification = Notification()

    def use() -> None:
        notification.clear()
        notification.wait(0)
        notification.set()
        notification.clear()

    for where in raising(use):
        told = threading.Thread(target=notification.set)
        told.start()
        told.join(60)
        assert not told.is_alive(), where
        assert notification.wait(0), where
