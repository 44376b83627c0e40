"""A plugin for pytest: the fixture `httpbin` is the server that URL names, in place of one on this machine.

The test suite of `requests` runs with it, so that each of its requests goes through the tunnel.
"""

import os
from types import SimpleNamespace

import pytest


@pytest.fixture
def httpbin():
    return SimpleNamespace(url=os.environ["URL"])
