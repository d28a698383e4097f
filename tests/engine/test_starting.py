"""What of an engine's options its transport is told (starting.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest

from datadist import LLMConfig, LLMException, LLMRole, LLMStatusCode
from datadist.engine import starting
from datadist.engine.options import EngineOptions
from datadist.transport import TransportOptions
from tests.interrupts import raising_at_jumps


def _told(
    monkeypatch: pytest.MonkeyPatch, config: LLMConfig, environ: dict[str, str]
) -> TransportOptions:
    """The options of a transport that is started with that configuration."""
    told: list[TransportOptions] = []

    def transport(told_now: TransportOptions) -> SimpleNamespace:
        told.append(told_now)
        capabilities = SimpleNamespace(parallel=1)
        return SimpleNamespace(describe=dict, capabilities=capabilities, close=lambda: None)

    _start(monkeypatch, config, environ, transport)
    (one,) = told
    return one


def _start(
    monkeypatch: pytest.MonkeyPatch, config: LLMConfig, environ: dict[str, str],
    transport: Callable[[TransportOptions], SimpleNamespace],
) -> None:  # fmt: skip
    with ExitStack() as closing:
        _prepared(monkeypatch, config, environ, transport)(closing)


def _prepared(
    monkeypatch: pytest.MonkeyPatch, config: LLMConfig, environ: dict[str, str],
    transport: Callable[[TransportOptions], SimpleNamespace],
) -> Callable[[ExitStack], object]:  # fmt: skip
    choice = SimpleNamespace(
        name="shm", backend="shm", why="a test", transport_class=transport,
        parts=[("shm", transport)],
    )  # fmt: skip
    monkeypatch.setattr(starting, "choose_backend", lambda *_: choice)
    given = {**config.generate_options(), "datadist.shm.speed": "9", "datadist.rdma.speed": "1"}
    options = EngineOptions.parse(given, LLMRole.MIX, environ)
    return partial(starting.start_transport, options, environ)


@pytest.mark.parametrize("parallel", [0, -1, True, 2.0, None, "4"])
def test_a_transport_that_declares_no_number_of_transfers_does_not_start(
    monkeypatch: pytest.MonkeyPatch, parallel: object
) -> None:
    config, closed = LLMConfig(), list[bool]()
    config.enable_cache_manager = True

    def transport(_: TransportOptions) -> SimpleNamespace:
        capabilities = SimpleNamespace(parallel=parallel)
        return SimpleNamespace(
            describe=dict, capabilities=capabilities, close=lambda: closed.append(True)
        )

    with pytest.raises(LLMException, match=rf"parallel is {parallel!r}, .*an int of 1") as caught:
        _start(monkeypatch, config, {}, transport)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    assert closed == [True]


def test_every_option_of_a_transport_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.device_id = 7
    config.listen_ip_info = "10.0.0.1:26000"
    config.rdma_traffic_class = 132
    config.rdma_service_level = 4
    config.link_total_time = 1080
    config.link_retry_count = 80
    config.local_comm_res = '{"version": "1.2"}'
    assert _told(monkeypatch, config, {"DATADIST_AUTH_KEY": "secret"}) == TransportOptions(
        device_id=7,
        listen_address="10.0.0.1",
        traffic_class=132,
        service_level=4,
        retry_count=80,
        link_timeout=1080,
        auth_key=b"secret",
        local_comm_res='{"version": "1.2"}',
        extra={"speed": "9"},
    )


def test_what_was_not_chosen_is_left_to_the_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLMConfig()
    config.enable_cache_manager = True
    assert _told(monkeypatch, config, {}) == TransportOptions(extra={"speed": "9"})


def test_a_start_that_is_interrupted_leaves_no_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    config, closed = LLMConfig(), list[object]()
    config.enable_cache_manager = True

    def prepare() -> tuple[ExitStack, Iterator[SimpleNamespace], Callable[[ExitStack], object]]:
        del closed[:]
        capabilities = SimpleNamespace(parallel=1)
        close = partial(closed.append, True)
        made = iter([SimpleNamespace(describe=dict, capabilities=capabilities, close=close)])
        # `next` is code in C, which no exception meets
        return ExitStack(), made, _prepared(monkeypatch, config, {}, partial(next, made))

    moments = 0
    for where, (closing, left, _) in raising_at_jumps(prepare, lambda state: state[2](state[0])):
        moments += 1
        closing.close()
        assert len(closed) + len(list(left)) == 1, where
    assert moments
