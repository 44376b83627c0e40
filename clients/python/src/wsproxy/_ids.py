"""The ids that the gateway accepts in names of channels and in paths."""

from __future__ import annotations

import re

from .errors import InvalidRequest

_ID = re.compile(r"[A-Za-z0-9\-_.~@+=|]{1,128}")


def check_id(what: str, name: str) -> str:
    """Returns an id as it is; raises :class:`InvalidRequest` for a name that is none."""
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise InvalidRequest(f"A {what} id has 1 to 128 letters, digits and -_.~@+=|.")
    return name
