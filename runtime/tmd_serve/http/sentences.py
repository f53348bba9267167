"""What is wrong with a field, as a sentence, for what pydantic found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import Refusal

_SHOWN = 60
_WORDS = {
    "missing": "is missing",
    "string_type": "must be a text",
    "string_pattern_mismatch": "must be WIDTHxHEIGHT in pixels, such as 832x480, or auto",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "is too large",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list of numbers",
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "must be at most {le:.10g}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "literal_error": "must be {expected}",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
}
"""Pydantic's kind of error -> what to say behind the field's name."""


def refusal_of(errors: Sequence[Any]) -> Refusal:
    """The first of pydantic's errors."""
    first: Mapping[str, Any] = errors[0]
    kind = first["type"]
    if kind == "json_invalid":
        return Refusal("the body is no JSON: " + first["msg"].removeprefix("Invalid JSON: ") + ".", code="invalid_json")
    name = _field(first["loc"])
    if kind == "extra_forbidden":
        return Refusal(f"there is no field {name}: see /openapi.json.", param=name, code="unknown_parameter")
    words = _WORDS.get(kind)
    if words is None:
        message = str(first["msg"]).removeprefix("Value error, ")
        words = f"is refused: {message[:1].lower()}{message[1:]}" if kind != "value_error" else message
    return Refusal(f"{name or 'the request'} {words.format_map(first.get('ctx', {}))}.", param=name)


def _field(where: Sequence[object]) -> str | None:
    """The field's name; behind it pydantic lists the kinds of values that it tried, and where in them it was."""
    names = [str(part) for part in where if part not in ("body", "query", "header", "path")]
    return short(names[0]) if names else None


def short(name: str) -> str:
    """A name that a client made up, in bounds."""
    return name if len(name) <= _SHOWN else name[:_SHOWN] + "..."
