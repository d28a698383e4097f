"""What an engine needs to start: descriptors, and a transport."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack

from datadist.base.file_size import LEAST, check_size
from datadist.base.log_prefix import attach
from datadist.base.shortage import is_shortage
from datadist.control import kernel_calls
from datadist.engine.options import EngineOptions
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transport import OptionError, Transport, TransportError, TransportOptions
from datadist.transports.defects import text_of
from datadist.transports.environment import options_of
from datadist.transports.loader import BackendError, Choice, choose_backend
from datadist.transports.option_keys import where

log = logging.getLogger("datadist.engine")


def check_file_size() -> None:
    """Raise ``OSError`` where the limit on file sizes leaves no room for the files of an engine."""
    check_size(LEAST)


def check_descriptors() -> None:
    """Raise if no descriptor is left: otherwise no installed transport would be found."""
    os.close(os.open("/", os.O_RDONLY | os.O_CLOEXEC))


def check_system_calls() -> None:
    """Try what the control plane asks of the kernel; say what it does without.

    Raises LLMException, LLM_FAILED, which names a call that every engine needs and the kernel refuses.
    """
    try:
        kernel_calls.check()
    except kernel_calls.CallRefused as error:
        raise LLMException(
            f"the engine cannot start: {error}", status_code=LLMStatusCode.LLM_FAILED
        ) from error
    for limit in kernel_calls.limits():
        log.info("system calls: %s", limit)


def start_transport(
    options: EngineOptions, environ: Mapping[str, str], closing: ExitStack
) -> tuple[Choice, Transport]:
    """The transport that was chosen, started; ``closing`` closes it, also where this is interrupted.

    Raises LLMException: LLM_PARAM_INVALID where none can be chosen or an option of it is wrong,
    LLM_FAILED where it does not start; and what the system refuses, as it is.
    """
    try:
        choice = choose_backend(options.backend, environ)
    except BackendError as error:
        key = "llm.TransferBackend"
        origin = f" [option {key}{where(key)}]" if options.backend else ""
        raise param_invalid(f"{error}{origin}") from error
    attach()
    given = options_of(choice.parts, options.extra, environ)
    settings = TransportOptions(
        device_id=options.device_id,
        listen_address=options.listen_ip,
        traffic_class=options.traffic_class,
        service_level=options.service_level,
        retry_count=options.link_retry_count,
        link_timeout=options.link_total_time,
        auth_key=options.auth_key,
        local_comm_res=options.local_comm_res,
        extra=given.values,
    )
    started: list[Transport] = []
    closing.callback(_close, started)
    try:
        started += map(choice.transport_class, (settings,))  # noted in C: no exception loses it
    except OptionError as error:
        where_set = given.set_by(str(error))
        raise param_invalid(f"backend {choice.name} does not start: {error}{where_set}") from error
    except TransportError as error:
        raise LLMException(
            f"backend {choice.name} ({choice.why}) does not start: {error}",
            status_code=LLMStatusCode.LLM_FAILED,
        ) from error
    except Exception as error:
        if is_shortage(error):
            raise
        log.error("defect of backend %s: its start raised what the interface does not allow",
                  choice.backend, exc_info=error)  # fmt: skip
        raise LLMException(
            f"backend {choice.backend} does not start: {type(error).__name__}: {error}",
            status_code=LLMStatusCode.LLM_FAILED,
        ) from error
    (transport,) = started
    attach()
    _check_parallel(choice, transport)
    log.info("backend %s: %s", choice.backend, _facts(transport))
    return choice, transport


def _close(started: list[Transport]) -> None:
    for transport in started:
        transport.close()


def _check_parallel(choice: Choice, transport: Transport) -> None:
    parallel = transport.capabilities.parallel
    if isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1:
        raise LLMException(
            f"defect of backend {choice.backend}: its Capabilities.parallel is {parallel!r}, which must "
            "be an int of 1 or more",
            status_code=LLMStatusCode.LLM_FAILED,
        )


def _facts(transport: Transport) -> str:
    try:
        facts = [f"{name} {value}" for name, value in transport.describe().items()]
    except Exception as error:
        return text_of(error, transport)
    return ", ".join(facts) or "no details"
