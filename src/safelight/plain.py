"""Frozen values to plain JSON values and back, by the types of their fields. Knows no file and no value of
its own.

What is read is not trusted: every key must be a field, every field must be there, every type must be the
field's, and no number may be infinite or NaN. A field made by `optional` is left out where it is None, so
that a value without it is written as it was before there was such a field.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, field, fields, is_dataclass
from enum import Enum
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

_OPTIONAL = "optional"  # the mark in a field's metadata


def is_number(value: object) -> bool:
    """Whether a value is a real number, numpy's included; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def optional() -> Any:
    """A field of a frozen value that is None where it is not given, and then not written."""
    return field(default=None, metadata={_OPTIONAL: True})


def _is_optional(item: Field[Any]) -> bool:
    return bool(item.metadata.get(_OPTIONAL))


def to_plain(value: Any) -> Any:
    """A value as dicts (fields in their order, other keys sorted), lists, strings and numbers."""
    if is_dataclass(value):
        found = {item: getattr(value, item.name) for item in fields(value)}
        kept = {item.name: part for item, part in found.items() if part is not None or not _is_optional(item)}
        return {name: to_plain(part) for name, part in kept.items()}
    if isinstance(value, Mapping):
        return {key: to_plain(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def from_plain(kind: Any, value: Any, at: str) -> Any:
    """The inverse: plain JSON values as `kind`, a type or a frozen value's class; `at` names them in errors.

    Raises ValueError, in one line, for what does not fit.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any:
        return _finite(value, at)
    if origin in (Union, UnionType):
        options = [option for option in inside if option is not NoneType]
        if value is None and NoneType in inside:
            return None
        fits = [option for option in options if len(options) == 1 or type(value) is option]
        if not fits:
            raise _odd(at, " or ".join(_word(option) for option in options), value)
        return from_plain(fits[0], value, at)
    if origin is tuple:
        if type(value) is not list:
            raise _odd(at, "a list", value)
        if inside[-1] is not Ellipsis and len(value) != len(inside):
            raise ValueError(f"{at} must hold {len(inside)} values; got {len(value)}")
        kinds = inside if inside[-1] is not Ellipsis else inside[:1] * len(value)
        return tuple(
            from_plain(*pair, f"{at}[{index}]") for index, pair in enumerate(zip(kinds, value, strict=True))
        )
    if origin is Mapping:
        if type(value) is not dict:
            raise _odd(at, "an object", value)
        return {name: from_plain(inside[1], item, f"{at}[{name!r}]") for name, item in value.items()}
    if is_dataclass(kind):
        return _from_object(kind, value, at)
    if kind is float:
        if type(value) not in (int, float):
            raise _odd(at, "a number", value)
        return _finite(value, at)
    if type(value) is not (str if issubclass(kind, Enum) else kind):
        raise _odd(at, _word(kind), value)
    return value


def _from_object(kind: Any, value: Any, at: str) -> Any:
    if type(value) is not dict:
        raise _odd(at, "an object", value)
    known = {item.name: item.type for item in fields(kind)}
    if unknown := sorted(value.keys() - known.keys()):
        raise ValueError(f"{at} has the unknown key {unknown[0]!r}; known are {sorted(known)}")
    free = {item.name for item in fields(kind) if _is_optional(item)}
    if missing := sorted(known.keys() - value.keys() - free):
        raise ValueError(f"{at} lacks the key {missing[0]!r}")
    return kind(
        **{name: from_plain(known[name], value[name], f"{at}.{name}") for name in known if name in value}
    )


def _finite(value: Any, at: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{at} must be finite; got {value!r}")
    if isinstance(value, dict):
        return {name: _finite(item, f"{at}[{name!r}]") for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, f"{at}[{index}]") for index, item in enumerate(value)]
    return value


def _word(kind: type) -> str:
    return {int: "a whole number", bool: "true or false"}.get(kind, "a string")


def _odd(at: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{at} must be {wanted}; got {type(value).__name__}")
