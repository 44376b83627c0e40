"""Named scenarios: small directed schedules of one kind of fault each, under the oracle of the random rounds."""

import importlib
from dataclasses import dataclass, field

import names
from oracle import Expectations

ALL = {}
_MODULES = ("identity", "links", "ids", "events", "bounds", "streams", "outages")


@dataclass(frozen=True)
class Scenario:
    """A scenario and the world it needs."""

    name: str
    run: object
    about: str
    expectations: Expectations = field(default_factory=Expectations)
    limits: names.Limits = field(default_factory=names.Limits)
    settings: dict = field(default_factory=dict)
    moves_clock: bool = False
    is_slow: bool = False


def scenario(
    *, lossless=False, calm=False, notices_max=None, limits=None, settings=None, moves_clock=False, slow=False
):
    """Registers a scenario under the name of its function; its docstring tells what befalls whom."""

    def register(function):
        ALL[function.__name__] = Scenario(
            function.__name__,
            function,
            " ".join(function.__doc__.split()),
            Expectations(lossless, calm, notices_max),
            limits or names.Limits(),
            settings or {},
            moves_clock,
            slow,
        )
        return function

    return register


def load():
    """All scenarios by name."""
    for module in _MODULES:
        importlib.import_module(f"scenarios.{module}")
    return ALL
