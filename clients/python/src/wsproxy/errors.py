"""The errors, as one small hierarchy: every error of this package is a :class:`WsproxyError`."""

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
    """The requested thing does not exist (any more), or the gateway has no such route."""


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
    """Another worker appended to the stream: this worker no longer owns it."""


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


class AgentReplaced(ConnectionClosed):
    """Another agent connected with this agent's credential, and the newer one holds the place.

    To come back would replace it in turn: end one of the two, or give each a credential of its own.
    """


class CallError(WsproxyError):
    """A call of a tool on a user's agent that gave no result. ``request_id`` names the call, also in the audit log."""

    def __init__(self, message: str, *, request_id: str = "") -> None:
        super().__init__(message)
        self.request_id = request_id


class ToolError(CallError):
    """The tool answered, with an error. A tool itself raises it for an error without the name of an exception."""


class AgentOffline(CallError):
    """No agent of the user is connected. The call was not sent to any."""


class AgentBusy(CallError):
    """The agent or the gateway has too many calls in flight, or the gateway ends. The call was not sent."""


class AgentGone(CallError):
    """The agent's connection ended with the call in flight: the tool may have run."""


class CallTimeout(CallError):
    """There was no answer within the timeout: the tool may have run."""


class CallCancelled(CallError):
    """Another process cancelled the call: the tool may have run in part."""


class CallDuplicate(CallError):
    """The idempotency key is that of an earlier call, which has ended: the tool ran, and its outcome is not kept."""
