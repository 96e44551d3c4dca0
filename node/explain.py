"""A mistake in an operator's file, as msgspec tells it, in words for the operator: which field, what is wrong, what is allowed."""

import re
from typing import Any, get_type_hints

from protocols.errors import ConfigError


def explain(message: str, kind: type, whole: str = "config") -> ConfigError:
    """The sentence of a `msgspec.ValidationError` as field path, problem and what is allowed.

    kind: the struct that was read. whole: what the path says of a mistake in no field.
    """
    problem, _, where = message.partition(" - at `$")
    path = where.rstrip("`").lstrip(".")
    if unknown := re.match(r"Object contains unknown field `(.+)`", problem):
        return ConfigError(_join(path, unknown[1]), "no such setting", _fields_at(kind, path))
    if missing := re.match(r"Object missing required field `(.+)`", problem):
        return ConfigError(_join(path, missing[1]), "must be given")
    if choice := re.match(r"Invalid enum value (.+)", problem):
        return ConfigError(path or whole, f"{choice[1]} is not one of the choices", _choices_at(kind, path))
    return ConfigError(path or whole, problem[:1].lower() + problem[1:])


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _type_at(kind: Any, path: str) -> Any:
    for part in path.split(".") if path else []:
        kind = get_type_hints(kind).get(part, kind)
        if options := getattr(kind, "__args__", None):  # `Shard | None`
            kind = next((option for option in options if hasattr(option, "__struct_fields__")), kind)
    return kind


def _fields_at(kind: type, path: str) -> list[str]:
    return sorted(getattr(_type_at(kind, path), "__struct_fields__", ()))


def _choices_at(kind: type, path: str) -> list[str]:
    return [str(option) for option in getattr(_type_at(kind, path), "__args__", ())]
