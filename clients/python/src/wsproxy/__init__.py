"""Workers and clients of the wsproxy gateway.

:class:`Worker` is the backend's side, over Redis or over HTTP; :mod:`wsproxy.client` is the other end.
"""

from ._feeds import Subscription
from .errors import (
    ConnectionClosed,
    GiveUp,
    InvalidRequest,
    NotFound,
    NotSupported,
    Refused,
    StreamConflict,
    StreamEnded,
    StreamError,
    StreamExists,
    StreamNotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
    WsproxyError,
)
from .serve import ServedSession, Serving
from .stream import TokenStream
from .types import (
    Event,
    Failure,
    Gap,
    GapCallback,
    History,
    HistoryEvent,
    Limits,
    Outgoing,
    Payload,
    Presence,
    Receipt,
    SessionEvent,
    SessionToken,
    UpstreamMessage,
)
from .worker import Worker

__all__ = [
    "ConnectionClosed",
    "Event",
    "Failure",
    "Gap",
    "GapCallback",
    "GiveUp",
    "History",
    "HistoryEvent",
    "InvalidRequest",
    "Limits",
    "NotFound",
    "NotSupported",
    "Outgoing",
    "Payload",
    "Presence",
    "Receipt",
    "Refused",
    "ServedSession",
    "Serving",
    "SessionEvent",
    "SessionToken",
    "StreamConflict",
    "StreamEnded",
    "StreamError",
    "StreamExists",
    "StreamNotFound",
    "Subscription",
    "TokenStream",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "UpstreamMessage",
    "Worker",
    "WsproxyError",
]
__version__ = "0.1.0"
