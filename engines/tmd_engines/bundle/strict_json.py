"""JSON that every reader understands alike: UTF-8, no key twice (readers differ in which one wins), no NaN."""

from __future__ import annotations

import json
from typing import Any

from ..errors import quote


def read_json(data: bytes) -> Any:
    """The document in `data`. Raises ValueError with a short, printable reason for anything else, deep nesting too."""

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {quote(key)} appears twice")
            found[key] = value
        return found

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=no_repeats, parse_constant=no_constant)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = quote(str(error), 200)[1:-1]
    raise ValueError(reason)
