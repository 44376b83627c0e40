"""A function as a tool: its parameters are checked against its signature before it runs."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

from ..errors import InvalidRequest
from ._context import Context
from ._hints import Mismatch, NotReadable, Reader, kind, reader


class BadParams(Exception):
    """Parameters of a call that do not fit the function; the text says all that is wrong."""


class Tool:
    """A function and what its parameters must be."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        """Raises :class:`InvalidRequest` for a function whose parameters cannot be given by name or read from JSON."""
        self.name = name
        self.function = function
        self.is_async = _is_async(function)
        self._context: str | None = None
        self._readers: dict[str, Reader] = {}
        self._required: list[str] = []
        self._takes_all = False
        try:
            hints = typing.get_type_hints(_annotated(function), include_extras=True)
        except (NameError, TypeError) as error:
            raise InvalidRequest(f"The annotations of the tool {name!r} cannot be resolved: {error}") from error
        for parameter in inspect.signature(function).parameters.values():
            self._add(parameter, hints.get(parameter.name, parameter.annotation))

    def _add(self, parameter: inspect.Parameter, hint: Any) -> None:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise InvalidRequest(f"The parameter {parameter.name!r} of the tool {self.name!r} has no name for callers.")
        if parameter.kind == parameter.VAR_KEYWORD:
            self._takes_all = True
            return
        if hint is Context:
            self._context = parameter.name
            return
        try:
            self._readers[parameter.name] = reader(hint)
        except NotReadable as error:
            text = f"The parameter {parameter.name!r} of the tool {self.name!r}: {error}."
            raise InvalidRequest(text) from error
        if parameter.default is parameter.empty:
            self._required.append(parameter.name)

    def arguments(self, params: Any) -> dict[str, Any]:
        """The arguments of the function; raises :class:`BadParams`."""
        if not isinstance(params, dict):
            raise BadParams(f"{self.name}: params must be an object, not {kind(params)}.")
        wrong = [f"the parameter {name!r} is missing" for name in self._required if name not in params]
        arguments: dict[str, Any] = {}
        for name, value in params.items():
            read = self._readers.get(name)
            if read is None and (not self._takes_all or name == self._context):
                wrong.append(f"there is no parameter {name!r}")
                continue
            try:
                arguments[name] = value if read is None else read(value, name)
            except Mismatch as error:
                wrong.append(str(error))
        if wrong:
            raise BadParams(f"{self.name}: {'; '.join(wrong)}.")
        return arguments

    def bound(self, arguments: dict[str, Any], context: Context) -> Callable[[], Any]:
        """The function with its arguments, ready to be called."""
        own = {} if self._context is None else {self._context: context}
        return functools.partial(self.function, **arguments, **own)


def _annotated(function: Callable[..., Any]) -> Any:
    """The part of a callable that has its annotations."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function):
        return function
    return type(function).__call__


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(_annotated(function))
