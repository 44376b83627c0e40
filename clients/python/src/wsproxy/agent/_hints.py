"""Values of JSON as the types that a function's parameters ask for. It knows nothing of calls."""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Reader: TypeAlias = Callable[[Any, str], Any]
"""Reads a value of JSON; raises :class:`Mismatch` with its place."""


class Mismatch(ValueError):
    """A value that is not of the type that its place asks for."""


class NotReadable(TypeError):
    """A type that no value of JSON can be read as."""


def reader(hint: Any) -> Reader:
    """The reader of a type hint; raises :class:`NotReadable`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, object, inspect.Parameter.empty):
        return lambda value, _: value
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is typing.Annotated:
        return reader(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _either([reader(each) for each in arguments], " or ".join(map(_name, arguments)))
    if origin is typing.Literal:
        return _one_of({_key(each): each for each in arguments})
    base = origin or hint
    if base in (list, collections.abc.Sequence, collections.abc.Iterable):
        return _list(reader(arguments[0] if arguments else Any))
    if base is tuple:
        return _tuple(arguments)
    if base in (dict, collections.abc.Mapping):
        return _dict(arguments)
    if typing.is_typeddict(base):
        hints, required = typing.get_type_hints(base), base.__required_keys__
        return _record({name: (reader(each), name in required) for name, each in hints.items()}, dict)
    if isinstance(base, type):
        return _class(base)
    raise NotReadable(f"{hint!r} cannot be read from JSON")


def _class(base: type[Any]) -> Reader:
    if issubclass(base, enum.Enum):
        return _one_of({_key(each.value): each for each in base})
    if issubclass(base, pathlib.PurePath):
        return lambda value, place: base(_str(value, place))
    if dataclasses.is_dataclass(base):
        hints = typing.get_type_hints(base, include_extras=True)
        return _record(
            {each.name: (reader(hints[each.name]), not _has_default(each)) for each in dataclasses.fields(base)},
            lambda members: base(**members),
        )
    if (validate := getattr(base, "model_validate", None)) is not None:
        return _model(validate)
    raise NotReadable(f"{base.__name__} cannot be read from JSON")


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _model(validate: Callable[[Any], Any]) -> Reader:
    def read(value: Any, place: str) -> Any:
        try:
            return validate(value)
        except ValueError as error:
            raise Mismatch(f"{place}: {error}") from error

    return read


def _wrong(value: Any, place: str, wanted: str) -> Mismatch:
    return Mismatch(f"{place} must be {wanted}, not {kind(value)}")


def kind(value: Any) -> str:
    """The word of JSON for a value's kind."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
    return "an object"


def _bool(value: Any, place: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(value, place, "a boolean")
    return value


def _int(value: Any, place: str) -> int:
    # Some languages write whole numbers with a point.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(value, place, "a whole number")
    return value


def _float(value: Any, place: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong(value, place, "a number")
    try:
        return float(value)
    except OverflowError as error:
        raise Mismatch(f"{place} is too large") from error


def _str(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise _wrong(value, place, "a string")
    return value


def _none(value: Any, place: str) -> None:
    if value is not None:
        raise _wrong(value, place, "null")


def _list(item: Reader) -> Reader:
    def read(value: Any, place: str) -> list[Any]:
        if not isinstance(value, list):
            raise _wrong(value, place, "an array")
        return [item(each, f"{place}[{number}]") for number, each in enumerate(value)]

    return read


def _tuple(arguments: tuple[Any, ...]) -> Reader:
    if not arguments or arguments[1:] == (Ellipsis,):
        read_list = _list(reader(arguments[0] if arguments else Any))
        return lambda value, place: tuple(read_list(value, place))
    items = [reader(each) for each in arguments]

    def read(value: Any, place: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) != len(items):
            raise _wrong(value, place, f"an array of {len(items)}")
        return tuple(
            item(each, f"{place}[{number}]") for number, (item, each) in enumerate(zip(items, value, strict=True))
        )

    return read


def _dict(arguments: tuple[Any, ...]) -> Reader:
    if arguments and arguments[0] not in (str, Any):
        raise NotReadable("keys of a JSON object are strings")
    item = reader(arguments[1] if arguments else Any)

    def read(value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong(value, place, "an object")
        return {name: item(each, f"{place}.{name}") for name, each in value.items()}

    return read


def _record(members: Mapping[str, tuple[Reader, bool]], make: Callable[[dict[str, Any]], Any]) -> Reader:
    def read(value: Any, place: str) -> Any:
        if not isinstance(value, dict):
            raise _wrong(value, place, "an object")
        if unknown := sorted(value.keys() - members.keys()):
            raise Mismatch(f"{place} has no member {unknown[0]!r}")
        if missing := [name for name, (_, required) in members.items() if required and name not in value]:
            raise Mismatch(f"{place}.{missing[0]} is missing")
        return make({name: members[name][0](each, f"{place}.{name}") for name, each in value.items()})

    return read


def _key(value: Any) -> tuple[str, Any]:
    # 1, 1.0 and true are equal in Python, and not in JSON.
    return kind(value), value


def _one_of(allowed: Mapping[tuple[str, Any], Any]) -> Reader:
    wanted = ", ".join(repr(value) for _, value in allowed)

    def read(value: Any, place: str) -> Any:
        if isinstance(value, list | dict) or _key(value) not in allowed:
            raise Mismatch(f"{place} must be one of {wanted}")
        return allowed[_key(value)]

    return read


def _either(readers: list[Reader], name: str) -> Reader:
    def read(value: Any, place: str) -> Any:
        for each in readers:
            try:
                return each(value, place)
            except Mismatch:
                continue
        raise _wrong(value, place, name)

    return read


def _name(hint: Any) -> str:
    known = _WORDS.get(typing.get_origin(hint) or hint)
    return known if known is not None else str(getattr(hint, "__name__", hint))


_WORDS: dict[Any, str] = {
    bool: "a boolean",
    int: "a whole number",
    float: "a number",
    str: "a string",
    type(None): "null",
    list: "an array",
    dict: "an object",
}
_PLAIN: dict[Any, Reader] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    None: _none,
    type(None): _none,
}
