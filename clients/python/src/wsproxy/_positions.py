"""Positions in a history, and what a worker must not give as an id of its own, since it would be taken for one."""

from __future__ import annotations

import re

START = "0-0"
"""Before everything."""

_POSITION = re.compile(r"([1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})-[0-9a-f]{8}")
# Also as positions were written before they had tags.
_LIKE_A_POSITION = re.compile(r"0|[0-9]+-[0-9]+(-[0-9a-fA-F]+)?")
_PLAIN = re.compile(r"[^ \x00-\x1f\x7f\ud800-\udfff]+")
_EVENT_ID_BYTES_MAX = 128
# First bytes of a message that a worker published with history, of this version or another one.
_ENVELOPE = re.compile(rb"\xffH[0-9]")


def parse(text: str) -> tuple[int, int] | None:
    """The id in a position ``milliseconds-sequence-tag``, by which positions are ordered; ``None``: it is none."""
    found = _POSITION.fullmatch(text)
    return (int(found[1]), int(found[2])) if found is not None else None


def order(text: str) -> tuple[int, int]:
    """By what a position is compared with others; one without a tag counts, everything else is before all."""
    return parse(text) or parse(f"{text}-00000000") or (0, 0)


def is_event_id(text: str) -> bool:
    """Whether a worker may give a message this id of its own."""
    return is_plain(text) and not _LIKE_A_POSITION.fullmatch(text)


def is_plain(text: str) -> bool:
    """Whether the gateway takes a text as the id behind which a client goes on."""
    return _PLAIN.fullmatch(text) is not None and len(text.encode()) <= _EVENT_ID_BYTES_MAX


def is_reserved(payload: bytes) -> bool:
    """Whether gateways would take a plain message for one that was published with history."""
    return _ENVELOPE.match(payload) is not None


def lost_behind(
    after: str,
    *,
    head: str,
    previous: str,
    is_whole: bool,
    is_known: bool,
    age_ms: int,
    head_ms: int,
) -> str | None:
    """Why something may be missing behind a position of a log; ``None``: nothing is. The gateway's rule.

    ``previous`` is the position before the entries that were read, or where the log ends if there are none.
    """
    if after in ("", "?"):
        return "ambiguous" if after else "unknown"
    if after == START:
        return None if is_whole else "trimmed"
    if not head:
        # No worker wrote for so long, or the log was removed.
        return "expired" if age_ms >= head_ms else "emptied"
    if previous == after:
        return None
    if order(after) < order(previous):
        return "trimmed"
    # A life of the log that began behind the position: what was in an earlier one is not known.
    return None if is_known and previous != START else "unknown"
