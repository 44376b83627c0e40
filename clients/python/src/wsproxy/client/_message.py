"""A message as a client gets it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Message:
    """A message that the gateway delivered: ``data`` is text, or bytes where it is not UTF-8.

    ``event_id`` is its position in the history, ``None`` where it has none. A member ``event_id`` of the message is
    the worker's, and another thing unless the worker gave none.
    """

    data: str | bytes
    event_id: str | None = None

    @cached_property
    def _parsed(self) -> Any:
        return json.loads(self.data)

    def json(self) -> Any:
        """The parsed message; raises :class:`ValueError` where it is not JSON."""
        return self._parsed

    @cached_property
    def object(self) -> dict[str, Any]:
        """The message where it is a JSON object, else an empty one."""
        if not (isinstance(self.data, str) and self.data.lstrip()[:1] == "{"):
            return {}
        try:
            parsed = self._parsed
        except ValueError:
            return {}
        return parsed if isinstance(parsed, dict) else {}

    @property
    def type(self) -> str:
        """The member ``type`` of a JSON object, else an empty string."""
        kind = self.object.get("type")
        return kind if isinstance(kind, str) else ""

    @property
    def is_history_lost(self) -> bool:
        """The gateway's notice that messages before this one are missing: reload what must be whole."""
        return self.type == "error" and self.object.get("code") == "history_lost"
