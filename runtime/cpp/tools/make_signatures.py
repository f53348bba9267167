"""Writes `src/bundle/signatures.inc`: the inputs and outputs of every graph of every family (run by hand).

The C++ library holds the graphs of a bundle against the same table as Python does, and binds its buffers by it. A test
compares the file with what `tmd_engines.bundle.families` says.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tmd_engines.bundle.families import FAMILIES

FILE = Path(__file__).parents[1] / "src" / "bundle" / "signatures.inc"


def signatures_text() -> str:
    """The content of the file: one line per tensor, then one per graph with caches."""
    rows, caches = [], []
    for family in FAMILIES.values():
        for graph, signature in family.signatures.items():
            for side, tensors in (("kInput", signature.inputs), ("kOutput", signature.outputs)):
                for name, tensor in tensors.items():
                    shape = ",".join(map(str, tensor.shape))
                    words = _quoted(name, tensor.dtype, shape, tensor.when)
                    rows.append(f"    {{{_quoted(family.name, graph)}, {side}, {words}}},")
            if signature.caches:
                caches.append(f"    {{{_quoted(family.name, graph, signature.caches)}}},")
    note = "// Written by tools/make_signatures.py from tmd_engines.bundle.families; do not edit.\n// clang-format off"
    return "\n".join([note, *_table("SignatureRow kSignatures", rows), "", *_table("CacheRow kCaches", caches), ""])


def _quoted(*words: str) -> str:
    return ", ".join(f'"{word}"' for word in words)


def _table(name: str, rows: Iterable[str]) -> list[str]:
    return [f"constexpr {name}[] = {{", *rows, "};"]


if __name__ == "__main__":
    FILE.write_text(signatures_text(), encoding="ascii")
    print(f"wrote {FILE}")
