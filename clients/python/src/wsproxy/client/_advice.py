"""Advice after a connection ended or could not be opened: the rule of ``spec/finality.json``, as functions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, TypeAlias

Advice: TypeAlias = Literal["retry", "slow", "credentials", "final"]
"""``retry``: after a pause. ``slow``: after a longer one. ``credentials``: with a fresh token. ``final``: not again."""

# Longer times that an answer asks for count as this, or a proxy could keep a client away for a day.
RETRY_AFTER_MAX = 300.0
# Least pause after `slow` where no answer says how long.
SLOW = 5.0

# The gateway's words for a token that does not open; every other 401 or 403 is about something else.
_CREDENTIALS = ("missing_credentials", "malformed_credentials", "invalid_token")
# One close code for several causes, which only the reason tells apart; every other reason is final.
POLICY = 1008
ADVICE_OF_POLICY: dict[str, Advice] = {"slow consumer": "retry", "too many messages": "slow"}
# Below 3000, these say that the same would happen again.
_FINAL = (1000, 1002, 1003, 1007, 1009, 1010)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that did not open a connection. ``code`` is empty where it is not the gateway's own."""

    status: int
    code: str
    message: str
    retryable: bool


def refusal(status: int, body: bytes) -> Refusal:
    """Reads an answer. It is the gateway's own where it has the gateway's form in every member."""
    try:
        error = json.loads(body)["error"]
        code, message, retryable = error["code"], error["message"], error["retryable"]
    except (ValueError, KeyError, TypeError, RecursionError):
        code = message = retryable = None
    if isinstance(code, str) and code and isinstance(message, str) and isinstance(retryable, bool):
        return Refusal(status, code, message, retryable)
    return Refusal(status, "", f"status {status}, and not an answer of the gateway", True)


def after_refusal(status: int, code: str, retryable: bool) -> Advice:
    """Returns the advice after an answer that did not open a connection."""
    if status in (429, 503):
        return "slow"
    if not code or retryable or status == 408 or not 400 <= status < 500:
        return "retry"
    return "credentials" if status in (401, 403) and code in _CREDENTIALS else "final"


def after_close(code: int, reason: str) -> Advice:
    """Returns the advice after the end of a connection that was open."""
    match code:
        case _ if code == POLICY:
            return ADVICE_OF_POLICY.get(reason, "final")
        case 1013:
            return "slow"
        case 4002:
            return "retry"
        case 4401:
            return "credentials"
        case _ if code in _FINAL or code >= 3000:
            # From 3000 on: replaced by a newer one, idle, ended by the backend, or with a code of the backend's own.
            return "final"
    return "retry"


def is_normal(code: int) -> bool:
    """Returns true where a final close code is a wanted end, and no error."""
    return code == 1000 or (code >= 3000 and code != 4001)
