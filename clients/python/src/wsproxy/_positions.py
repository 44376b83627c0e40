"""Positions in a history, and the ids that a worker must not give, since they would be taken for positions."""

from __future__ import annotations

import re

START = "0-0"
"""The position before all others."""

_POSITION = re.compile(r"([1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})-[0-9a-f]{8}")
# This also matches positions of the version before, which had no tags.
_LIKE_A_POSITION = re.compile(r"0|[0-9]+-[0-9]+(-[0-9a-fA-F]+)?")
_PLAIN = re.compile(r"[^ \x00-\x1f\x7f\ud800-\udfff]+")
_EVENT_ID_BYTES_MAX = 128
# First bytes of a message that a worker published with history, of this version or another one.
_ENVELOPE = re.compile(rb"\xffH[0-9]")


def parse(text: str) -> tuple[int, int] | None:
    """Returns the id in a position ``milliseconds-sequence-tag``, which orders positions; ``None`` for other texts."""
    found = _POSITION.fullmatch(text)
    return (int(found[1]), int(found[2])) if found is not None else None


def order(text: str) -> tuple[int, int]:
    """Returns the sort key of a position, with or without a tag; other texts sort before all positions."""
    return parse(text) or parse(f"{text}-00000000") or (0, 0)


def is_event_id(text: str) -> bool:
    """Returns true where a worker may give a message this id of its own."""
    return is_plain(text) and not _LIKE_A_POSITION.fullmatch(text)


def is_plain(text: str) -> bool:
    """Returns true where the gateway takes a text as the id behind which a client goes on."""
    return _PLAIN.fullmatch(text) is not None and len(text.encode()) <= _EVENT_ID_BYTES_MAX


def is_reserved(payload: bytes) -> bool:
    """Returns true where gateways would take a plain message for one that was published with history."""
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
    """Returns the reason why a message may be missing behind a position; ``None``: none is. The gateway's rule.

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
