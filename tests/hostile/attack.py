"""The hostile process: a thread per engine and behaviour, which comes again when it is disconnected."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.hostile.behaviours import BEHAVIOURS
from tests.hostile.member import Ended, Member, Target
from tests.nodes import Here

AGAIN_SECONDS = 0.02
JOIN_SECONDS = 20.0


@dataclass
class Attack:
    """What is under way, and how often."""

    over: threading.Event = field(default_factory=threading.Event)
    joined: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    threads: list[threading.Thread] = field(default_factory=list)


def begin(here: Here, targets: list[Target], names: list[str]) -> None:
    """Begin these behaviours against each of these engines, and wait until each was a member once.

    Without any, only compute.
    """
    attack = here.any["attack"] = Attack()
    numbers = itertools.count(random.Random(0).getrandbits(32))
    for name in names:
        for target in targets:
            thread = threading.Thread(
                target=_behave, args=(attack, target, name, numbers), daemon=True
            )
            attack.threads.append(thread)
            thread.start()
    if not names:
        attack.threads.append(threading.Thread(target=_compute, args=(attack,), daemon=True))
        attack.threads[0].start()
    deadline = time.monotonic() + JOIN_SECONDS
    while any(not attack.joined[name] for name in names) and time.monotonic() < deadline:
        time.sleep(0.005)


def _compute(attack: Attack) -> None:
    while not attack.over.is_set():
        sum(range(1000))


def _behave(attack: Attack, target: Target, name: str, numbers: itertools.count[int]) -> None:
    while not attack.over.is_set():
        try:
            member = Member(target, next(numbers))
        except (OSError, ValueError):  # it has ended, or takes no more for now
            time.sleep(AGAIN_SECONDS)
            continue
        try:
            member.join()
            attack.joined[name] += 1
            for _ in BEHAVIOURS[name](member):
                attack.steps[name] += 1
                if attack.over.is_set():
                    break
        except (Ended, OSError):
            time.sleep(AGAIN_SECONDS)
        except NotImplementedError:
            return
        finally:
            member.close()


def end(here: Here) -> tuple[dict[str, int], dict[str, int]]:
    """Stop; how often it became a member, and how many steps it did, by behaviour."""
    attack = here.any.pop("attack")
    attack.over.set()
    for thread in attack.threads:
        with contextlib.suppress(RuntimeError):
            thread.join(10)
    return dict(attack.joined), dict(attack.steps)
