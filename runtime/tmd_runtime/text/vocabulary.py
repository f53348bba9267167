"""A prompt against the words that a model knows, for a bundle that lists them (`draws` in its manifest).

`runtime/cpp/src/text/vocabulary.cpp` finds the same words and says the same.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tmd_engines.bundle.text import DrawsInfo

_WORD = re.compile(r"\w+(?:'\w+)*")
_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")  # all that a word of a model has
_SHOWN, _LONGEST = 5, 40


def unknown_words(prompt: str, draws: DrawsInfo | None) -> list[str]:
    """A note that names the words of a prompt that the model does not know, and says what it draws; none if there are
    none, or if the model does not say which it knows."""
    if draws is None:
        return []
    unknown = [word for word in dict.fromkeys(_WORD.findall(prompt.translate(_LOWER))) if word not in draws.words]
    if not unknown:
        return []
    shown = [f'"{word if len(word) <= _LONGEST else word[:_LONGEST] + "..."}"' for word in unknown[:_SHOWN]]
    more = f" and {len(unknown) - _SHOWN} more words" if len(unknown) > _SHOWN else ""
    return [
        f'this model does not know {", ".join(shown)}{more}: it draws {draws.description}. Example: "{draws.example}".'
    ]
