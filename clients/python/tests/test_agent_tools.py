"""Functions as tools: what their parameters may be, and what callers are told where a call does not fit."""

from __future__ import annotations

import dataclasses
import enum
import functools
import pathlib
from typing import Annotated, Any, Literal, TypedDict

import pytest

from wsproxy import InvalidRequest
from wsproxy.agent import Agent, Context
from wsproxy.agent._tool import BadParams, Tool


class Colour(enum.Enum):
    RED = "red"
    ONE = 1


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Range(TypedDict, total=False):
    first: int


class Model:
    """As a model of pydantic."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def model_validate(cls, value: Any) -> Model:
        if not isinstance(value, dict) or "text" not in value:
            raise ValueError("text is missing")
        return cls(value["text"])


def plain(a: int, b: float = 0.5, c: str | None = None, d: bool = False) -> None: ...
def nested(points: list[Point], by_name: dict[str, tuple[int, str]], range: Range | None = None) -> None: ...
def choices(mode: Literal["r", "w", 1], colour: Colour = Colour.RED) -> None: ...
def others(path: pathlib.Path, rest: tuple[int, ...], any: Any, untyped, note: Annotated[str, "x"]) -> None: ...  # type: ignore[no-untyped-def]
def with_context(ctx: Context, path: str) -> None: ...
def takes_all(a: int, **more: Any) -> None: ...
def with_model(model: Model) -> None: ...


@pytest.mark.parametrize(
    ("function", "params", "wanted"),
    [
        (plain, {"a": 1}, {"a": 1}),
        (plain, {"a": 2.0, "b": 3, "c": None, "d": True}, {"a": 2, "b": 3.0, "c": None, "d": True}),
        (
            nested,
            {"points": [{"x": 1}, {"x": 2, "y": 3}], "by_name": {"ä": [1, "b"]}, "range": {}},
            {"points": [Point(1), Point(2, 3)], "by_name": {"ä": (1, "b")}, "range": {}},
        ),
        (choices, {"mode": 1, "colour": "red"}, {"mode": 1, "colour": Colour.RED}),
        (
            others,
            {"path": "/x/y", "rest": [1, 2], "any": {"k": [None]}, "untyped": [1.5], "note": "n"},
            {"path": pathlib.Path("/x/y"), "rest": (1, 2), "any": {"k": [None]}, "untyped": [1.5], "note": "n"},
        ),
        (with_context, {"path": "p"}, {"path": "p"}),
        (takes_all, {"a": 1, "b": [2]}, {"a": 1, "b": [2]}),
    ],
)
def test_params_become_arguments(function: Any, params: Any, wanted: Any) -> None:
    arguments = Tool("t", function).arguments(params)
    assert arguments == wanted
    assert {name: type(value) for name, value in arguments.items()} == {n: type(v) for n, v in wanted.items()}


@pytest.mark.parametrize(
    ("function", "params", "told"),
    [
        (plain, {}, "t: the parameter 'a' is missing."),
        (plain, {"a": "1"}, "t: a must be a whole number, not a string."),
        (plain, {"a": True}, "t: a must be a whole number, not a boolean."),
        (plain, {"a": 1.5}, "t: a must be a whole number, not a number."),
        (plain, {"a": None}, "t: a must be a whole number, not null."),
        (plain, {"a": 1, "b": 10**400}, "t: b is too large."),
        (plain, {"a": 1, "c": 5}, "t: c must be a string or null, not a number."),
        (plain, {"a": 1, "d": 0}, "t: d must be a boolean, not a number."),
        (plain, {"x": 1, "b": "y"}, "t: the parameter 'a' is missing; there is no parameter 'x'; b must be a number"),
        (plain, [], "t: params must be an object, not an array."),
        (plain, "x", "t: params must be an object, not a string."),
        (nested, {"points": [{"x": 1}, {"y": 1}], "by_name": {}}, "t: points[1].x is missing."),
        (nested, {"points": [{"x": 1, "z": 1}], "by_name": {}}, "t: points[0] has no member 'z'."),
        (nested, {"points": [], "by_name": {"k": [1]}}, "t: by_name.k must be an array of 2, not an array."),
        (nested, {"points": 1, "by_name": {}}, "t: points must be an array, not a number."),
        (nested, {"points": [], "by_name": []}, "t: by_name must be an object, not an array."),
        (choices, {"mode": "x"}, "t: mode must be one of 'r', 'w', 1."),
        (choices, {"mode": True}, "t: mode must be one of 'r', 'w', 1."),
        (choices, {"mode": ["r"]}, "t: mode must be one of 'r', 'w', 1."),
        (with_context, {"path": "p", "ctx": 1}, "t: there is no parameter 'ctx'."),
        (with_model, {"model": {}}, "t: model: text is missing."),
    ],
)
def test_params_that_do_not_fit_are_told_with_their_place(function: Any, params: Any, told: str) -> None:
    with pytest.raises(BadParams) as raised:
        Tool("t", function).arguments(params)
    assert str(raised.value).startswith(told)


def test_a_model_validates_itself() -> None:
    assert Tool("t", with_model).arguments({"model": {"text": "x"}})["model"].text == "x"


def test_a_method_and_a_partial_are_tools() -> None:
    class Files:
        def read(self, path: str) -> str:
            return path

        async def __call__(self, path: str) -> str:
            return path

    assert Tool("t", Files().read).arguments({"path": "p"}) == {"path": "p"}
    assert Tool("t", Files()).is_async
    assert Tool("t", functools.partial(plain, b=2.0)).arguments({"a": 1, "b": 1}) == {"a": 1, "b": 1.0}


def positional(a: int, /) -> None: ...
def variable(*a: int) -> None: ...
def bytes_(a: bytes) -> None: ...
def keys(a: dict[int, str]) -> None: ...
def unknown(a: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize("function", [positional, variable, bytes_, keys, unknown])
def test_a_function_that_no_call_can_fit_is_refused_at_once(function: Any) -> None:
    with pytest.raises(InvalidRequest, match="tool"):
        Tool("t", function)


def test_tools_have_names_of_their_own() -> None:
    agent = Agent("http://127.0.0.1:1", "u1", "s")
    agent.tool(plain)
    agent.tool(name="other")(plain)
    with pytest.raises(InvalidRequest, match="two tools"):
        agent.tool(plain)
    with pytest.raises(InvalidRequest, match="name"):
        agent.tool(functools.partial(plain, a=1))


@pytest.mark.parametrize(
    ("url", "user", "secret"),
    [
        ("http://127.0.0.1:1/?secret=x", "u1", "s"),
        ("http://u1:pw@127.0.0.1:1/", "u1", "s"),
        ("ftp://127.0.0.1:1/", "u1", "s"),
        ("http://127.0.0.1:1/", "u 1", "s"),
        ("http://127.0.0.1:1/", "", "s"),
        ("http://127.0.0.1:1/", "u1", ""),
    ],
)
def test_an_agent_that_could_never_connect_is_refused_at_once(url: str, user: str, secret: str) -> None:
    with pytest.raises(InvalidRequest):
        Agent(url, user, secret)
