"""What can go wrong, as one small hierarchy: every error of this package is a :class:`WsproxyError`."""

from __future__ import annotations


class WsproxyError(Exception):
    """Anything that this package raises on its own account."""


class InvalidRequest(WsproxyError, ValueError):
    """The call cannot succeed as it is: an id, a limit or a combination of arguments is not allowed."""


class TooLarge(InvalidRequest):
    """A message or a stream's text is larger than the gateway or the script accepts."""


class Unauthorized(WsproxyError):
    """The API key or token is missing, unknown, expired or used."""


class NotFound(WsproxyError):
    """What was asked for does not exist (any more), or the gateway has no such route."""


class NotSupported(WsproxyError):
    """This backend or transport cannot do it; the message names one that can."""


class Unavailable(WsproxyError):
    """Redis or the gateway could not be reached, or refused, for all the time allowed. Trying again later is right.

    A refusal (Redis is full, has too few replicas, is loading, …) says "Not done" and why.
    ``in_doubt`` is true where the call may have been done although no answer came.
    ``retry_after`` is what the gateway asked for, in seconds.
    """

    def __init__(self, message: str, *, in_doubt: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.in_doubt = in_doubt
        self.retry_after = retry_after


class StreamError(WsproxyError):
    """A token stream is not in the state that the call needs."""


class StreamNotFound(StreamError):
    """There is no such stream: never opened, expired, or Redis came back empty."""


class StreamExists(StreamError):
    """A stream of this id was opened before."""


class StreamConflict(StreamError):
    """Somebody else appended to the stream: this worker no longer owns it."""


class StreamEnded(StreamError):
    """The stream has ended already. ``outcome`` is ``finish``, ``error``, ``cancelled`` or ``unknown``."""

    def __init__(self, message: str, outcome: str) -> None:
        super().__init__(message)
        self.outcome = outcome


class GiveUp(WsproxyError):
    """Raised by a client's token function: there will be no token, since the user has signed out, for example.

    The client ends, and its iterator raises this error. After every other exception it tries again.
    """


class Refused(WsproxyError):
    """The gateway itself refused a client before the connection was open, in a way that trying again does not mend.

    ``status`` is the HTTP status, ``code`` the gateway's word for it (such as ``invalid_token``).
    """

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ConnectionClosed(WsproxyError):
    """The connection ended for good. ``code`` is the WebSocket close code, ``reason`` its text."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"closed with {code} {reason}".rstrip())
        self.code = code
        self.reason = reason
