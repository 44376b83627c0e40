"""The interface of a way to users' agents, over Redis or over HTTP; :class:`wsproxy.Agents` knows only this."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeGuard

from ._backoff import Backoff
from .errors import (
    AgentBusy,
    AgentGone,
    AgentOffline,
    CallCancelled,
    CallDuplicate,
    CallError,
    CallTimeout,
    InvalidRequest,
    ToolError,
    Unavailable,
    WsproxyError,
)

# The gateway itself ends a call at its deadline. Its answer may be so many seconds on the way.
GRACE = 2.0
# The gateway takes messages of 128 levels, of which some are around the value.
_DEPTH_MAX = 120
_TOO_DEEP = f"it is nested more deeply than {_DEPTH_MAX} levels"


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a call, as its tool says it."""

    progress: float
    total: float | None = None
    message: str | None = None


ProgressCallback: TypeAlias = Callable[[Progress], Awaitable[None] | None]
"""Called in the task that waits for the call. A callback that is slow gets the newest progress only."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that is ready to go out. ``timeout`` is what remains of it, in seconds."""

    user: str
    request_id: str
    tool: str
    params: str
    timeout: float
    has_key: bool
    on_progress: ProgressCallback | None
    traceparent: str | None = None


class Calls(Protocol):
    """A way to users' agents. :meth:`call` tries an agent that cannot take the call again for ``retry_for`` seconds."""

    async def call(self, call: Call, retry_for: float) -> Any: ...
    async def cancel(self, user: str, request_id: str) -> None: ...
    async def is_connected(self, user: str) -> bool: ...
    async def aclose(self) -> None: ...


class NotDone(Exception):
    """An attempt that may be made again without running the tool twice.

    ``error`` is what the caller gets where there is no further attempt. ``is_absent`` is true where the agent cannot
    take the call now.
    """

    def __init__(self, error: WsproxyError, *, is_absent: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(str(error))
        self.error = error
        self.is_absent = is_absent
        self.retry_after = retry_after


async def repeated(
    call: Call,
    retry_for: float,
    attempt: Callable[[Call], Awaitable[Any]],
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Any:
    """Makes attempts within the timeout of a call as long as they raise :class:`NotDone`, and pauses between them."""
    end, backoff = time.monotonic() + call.timeout, Backoff(base=0.1, cap=1.0)
    # The time from which on the agent could not take the call.
    absent_since: float | None = None
    while True:
        try:
            return await attempt(dataclasses.replace(call, timeout=max(0.001, end - time.monotonic())))
        except NotDone as not_done:
            now, seconds, last = time.monotonic(), backoff.next(not_done.retry_after), end
            if not not_done.is_absent:
                absent_since = None
            else:
                absent_since = now if absent_since is None else absent_since
                last = min(end, absent_since + retry_for)
            if now + seconds > last:
                raise not_done.error from not_done
        await pause(seconds)


_ERRORS: dict[str, type[CallError]] = {
    "agent_offline": AgentOffline,
    "agent_gone": AgentGone,
    "busy": AgentBusy,
    "cancelled": CallCancelled,
    "duplicate": CallDuplicate,
    "timeout": CallTimeout,
}


def is_failure(code: str) -> bool:
    """Returns true for a code that says how a call ended, and not only that a request was refused."""
    return code in _ERRORS or code in ("conflict", "outcome_unknown")


def failure(code: str, message: str, request_id: str) -> WsproxyError:
    """The error of a call that ended without an answer of its tool."""
    if code == "conflict":
        return InvalidRequest(f"The idempotency key was used for another call: {message}")
    if code == "bad_request":
        return InvalidRequest(message)
    if code in _ERRORS:
        return _ERRORS[code](message, request_id=request_id)
    return Unavailable(f"{message} ({code})", in_doubt=True)


def written(value: object) -> str:
    """JSON of a value; raises :class:`InvalidRequest` where there is none that the gateway takes."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("a text holds half of a surrogate pair") from error
    except RecursionError as error:
        raise InvalidRequest(_TOO_DEEP) from error
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"it cannot be written as JSON: {error}") from error
    if text.count("[") + text.count("{") > _DEPTH_MAX and _depth(value) > _DEPTH_MAX:
        raise InvalidRequest(_TOO_DEEP)
    return text


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list | tuple)]:
        depth += 1
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
    return depth


def progress_of(message: Mapping[str, Any]) -> Progress | None:
    """The progress in a message, or ``None`` where it has none."""
    done, total, text = message.get("progress"), message.get("total"), message.get("message")
    if not _is_number(done):
        return None
    return Progress(done, total if _is_number(total) else None, text if isinstance(text, str) else None)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_object(payload: bytes | str) -> tuple[dict[str, Any], str | None]:
    """A JSON object from the other side, and why its values cannot be used, if so.

    A number of thousands of digits, which Python refuses to read, leaves the other members readable, so that a call has
    an end.
    """
    try:
        problem, read = None, json.loads(payload)
    except RecursionError:
        return {}, "it is nested too deeply"
    except UnicodeDecodeError:
        return {}, "it is not UTF-8"
    except json.JSONDecodeError:
        return {}, "it is no JSON"
    except ValueError:
        problem, read = "a number has too many digits", json.loads(payload, parse_int=float)
    return (read, problem) if isinstance(read, dict) else ({}, "it is no JSON object")


def not_done(error: WsproxyError, has_key: bool) -> NotDone | None:
    """Another attempt after a call that failed with ``error``, if it cannot run the tool twice."""
    if isinstance(error, AgentOffline | AgentBusy):
        return NotDone(error, is_absent=True)
    if isinstance(error, AgentGone):
        return NotDone(error) if has_key else None
    if isinstance(error, Unavailable):
        return NotDone(error, retry_after=error.retry_after or 0.0) if has_key or not error.in_doubt else None
    return None


def answer_of(message: Mapping[str, Any], problem: str | None, request_id: str) -> Any:
    """The result in an answer as gateways publish it; raises the error where it has none."""
    if problem is not None:
        raise ToolError(f"The result cannot be read: {problem}.", request_id=request_id)
    code, text = message.get("code"), str(message.get("error") or "")
    if isinstance(code, str) and message.get("success") is not True:
        raise failure(code, text.removeprefix(f"{code}: "), request_id)
    if message.get("success") is True:
        return message.get("result")
    raise ToolError(text or "The tool failed and does not say why.", request_id=request_id)
