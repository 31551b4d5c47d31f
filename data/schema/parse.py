"""TOML tables -> frozen dataclasses, with errors that name the key's path. The one place where configuration is parsed."""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from ..errors import InputError  # relative: an exported artifact carries this file

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; InputError if the file is missing, not readable, or not TOML (the line and column are in the message)."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte-order mark
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path (it is taken relative to {Path.cwd()})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}; fix that line") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from None


def parse_dataclass(cls: type[T], table: Any, source: str, path: str = "") -> T:
    """Build dataclass `cls` from a TOML table; the InputError names file, `source`, key, below `path`, value, what was wanted and the fix.

    Its fields are int, float, bool, str, Literal, tuple[X, ...], dict[str, X], X | None or further dataclasses.
    """
    where = f"{source}: {path}" if path else source
    if not isinstance(table, Mapping):
        raise InputError(f"{where} = {table!r}: wanted a table of keys; write [{path}]")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise InputError(unknown_key(f"{where}.{key}" if path else f"{where}: {key}", key, fields))
    values = {}
    for name, field in fields.items():
        dotted = f"{path}.{name}" if path else name
        if name in table:
            values[name] = parse_value(hints[name], table[name], source, dotted)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{source}: {dotted} is missing; wanted {describe(hints[name])}; add it")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where + '.' if path else where + ': '}{error}") from None


def unknown_key(where: str, key: str, known: Any) -> str:
    """One line for an unknown key, with the nearest known one as the fix."""
    near = difflib.get_close_matches(key, list(known), n=1)
    fix = f"did you mean {near[0]!r}?" if near else f"remove it, or use one of: {', '.join(sorted(known))}"
    return f"{where} is not a known key; {fix}"


def describe(hint: Any) -> str:
    """A type in words for messages."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in typing.get_args(hint) if arg is not type(None))
    if origin is tuple:
        return f"a list of {describe(typing.get_args(hint)[0])}"
    if origin is dict:
        return f"a table of {describe(typing.get_args(hint)[1])}"
    if dataclasses.is_dataclass(hint):
        return "a table"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(hint, str(hint))


def parse_value(hint: Any, value: Any, source: str, path: str) -> Any:
    """Check one TOML value against a type hint and convert it (lists to tuples, tables to dataclasses)."""
    origin = typing.get_origin(hint)
    wrong = InputError(f"{source}: {path} = {value!r}: wanted {describe(hint)}; change the value")
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        kinds = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        for arg in kinds:
            try:
                return parse_value(arg, value, source, path)
            except InputError:
                if len(kinds) == 1:  # it says more
                    raise
        raise wrong
    if origin is Literal:
        if not any(value == allowed and type(value) is type(allowed) for allowed in typing.get_args(hint)):
            raise wrong
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong
        item = typing.get_args(hint)[0]
        return tuple(parse_value(item, each, source, f"{path}[{index}]") for index, each in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong
        item = typing.get_args(hint)[1]
        return {str(key): parse_value(item, each, source, f"{path}.{key}") for key, each in value.items()}
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return parse_dataclass(hint, value, source, path)  # type: ignore[arg-type]
    if isinstance(value, bool) and hint is not bool:  # an int to Python
        raise wrong
    if hint is float and isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    if hint is int and isinstance(value, int) and abs(value) >= 2**63:
        raise InputError(f"{source}: {path} = {value}: wanted an integer of 64 bits; lower the value")
    if hint is str and isinstance(value, str) and "\0" in value:
        raise InputError(f"{source}: {path} = {value!r}: wanted a string without NUL characters; change it")
    if hint in (bool, int, str) and isinstance(value, hint):
        return value
    raise wrong


def to_toml_value(value: Any) -> Any:
    """Turn a dataclass tree into what a TOML writer takes; None means "not set" and is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init)
        return {name: to_toml_value(each) for name, each in pairs if each is not None}
    if isinstance(value, Mapping):
        return {key: to_toml_value(each) for key, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [to_toml_value(each) for each in value]
    return value
