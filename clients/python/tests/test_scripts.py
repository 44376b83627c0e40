"""The scripts in the package are those that the gateway uses."""

from __future__ import annotations

import pytest

from conftest import ROOT
from wsproxy._redis import script


@pytest.mark.parametrize("name", ["publish.lua", "read.lua", "room_leave.lua", "stream.lua"])
def test_the_scripts_are_byte_for_byte_those_of_the_specification(name: str) -> None:
    assert script(name).encode() == (ROOT / "spec/scripts" / name).read_bytes()
