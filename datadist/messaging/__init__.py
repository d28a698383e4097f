"""For transports over engines that send and receive messages: the base class and the interface."""

from datadist.messaging.engine import (
    Arrived,
    Completed,
    Endpoint,
    Engine,
    EngineError,
    EngineEvent,
    Lost,
)
from datadist.messaging.transport import MessagingTransport

__all__ = [
    "Arrived",
    "Completed",
    "Endpoint",
    "Engine",
    "EngineError",
    "EngineEvent",
    "Lost",
    "MessagingTransport",
]
