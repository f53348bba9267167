"""Writes `src/text/html_entities.inc` and `src/text/mojibake_classes.inc`: the tables of prompt cleaning (run by hand).

HTML's named references come from Python's `html.entities` (W3C's list), the classes of characters that give wrongly
decoded text away from ftfy (https://github.com/rspeer/python-ftfy, Apache-2.0): both implementations must agree on them
to the letter. A test compares the files with the packages in use.
"""

from __future__ import annotations

import html
import re
from html.entities import html5
from pathlib import Path

from ftfy.badness import MOJIBAKE_CATEGORIES

FOLDER = Path(__file__).parents[1] / "src" / "text"
NOTE = "// Written by tools/make_text_tables.py; do not edit.\n"


def entities() -> dict[str, tuple[str, bool]]:
    """Name without '&' -> (characters, whether only ftfy knows it): HTML's, and those in capitals that ftfy adds."""
    found = {name: (value, False) for name, value in html5.items()}
    for name, value in html5.items():
        upper = name.upper()
        if name.endswith(";") and name == name.lower() and html.unescape("&" + upper) == "&" + upper:
            found[upper] = (value.upper(), True)
    return found


def entities_text() -> str:
    rows = [
        f'{{"{name}",{{{",".join(hex(ord(c)) for c in value)}}},{int(only)}}},'
        for name, (value, only) in sorted(entities().items(), key=lambda item: item[0].encode())
    ]
    lines, line = [], ""
    for row in rows:
        if len(line) + len(row) > 120:
            lines.append(line)
            line = ""
        line += row
    return NOTE + "\n".join([*lines, line, ""])


def classes_text() -> str:
    lines = [NOTE.rstrip("\n")]
    for bit, (name, content) in enumerate(MOJIBAKE_CATEGORIES.items()):
        members = [c for c in range(0x10000) if not 0xD800 <= c < 0xE000 and re.match(f"[{content}]", chr(c))]
        first = 0
        for i in range(1, len(members) + 1):
            if i == len(members) or members[i] != members[i - 1] + 1:
                lines.append(f"{{0x{members[first]:04x}, 0x{members[i - 1]:04x}, 1u << {bit}}},  // {name}")
                first = i
    return "\n".join([*lines, ""])


FILES = {"html_entities.inc": entities_text, "mojibake_classes.inc": classes_text}

if __name__ == "__main__":
    for file, text in FILES.items():
        (FOLDER / file).write_text(text(), encoding="ascii")
        print(f"wrote {FOLDER / file}")
