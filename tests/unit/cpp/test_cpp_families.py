"""The C++ library asks a family's object, never its name, and its rooms stand one on top of the other."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.helpers.cpp_tools import SOURCES
from tmd_engines.bundle.families import FAMILIES
from tmd_engines.bundle.families.rules import RULES

ROOT = SOURCES / "src"
FLOORS = ("base", "bundle", "text", "engines", "sampling", "autoencoder", "run", "api")
"""Each includes only itself and those before it."""

FAMILY_FILES = {f"sampling/{name}{end}" for name in FAMILIES for end in (".cpp", "_settings.cpp", "_settings.hpp")} | {
    "sampling/rules.cpp",  # the table of rules
    "sampling/wan.hpp",  # what wan and anyflow share
    "bundle/signatures.inc",  # written from the families' own tables
}
NAMES = {*FAMILIES, *RULES, "flow_map"}

ALLOWED = {
    ("engines/onnxruntime_library.cpp", "tmd"): "this library, as ONNX Runtime knows its user",
    ("bundle/sections.hpp", "wan"): "the tokenization of that name, which families share",
    ("bundle/sections.cpp", "wan"): "the same, where it is read and checked",
}
"""(file, word) -> why the word may stand there."""


def shared_files() -> list[Path]:
    files = [path for path in ROOT.rglob("*") if path.suffix in (".cpp", ".hpp", ".inc")]
    return [path for path in files if path.relative_to(ROOT).as_posix() not in FAMILY_FILES]


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def words_in(text: str) -> set[str]:
    """The names of families and rules that stand in quotes; a comparison, or a choice, needs one."""
    return set(re.findall(r'"([^"\\\n]*)"', without_comments(text))) & NAMES


def test_no_shared_source_names_a_family_or_a_rule() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), word)
        for path in shared_files()
        for word in words_in(path.read_text(encoding="utf-8"))
    }
    assert len(shared_files()) > 60
    assert found == set(ALLOWED), "ask the family (bundle/family.hpp, sampling/family.hpp), or give the reason here"


@pytest.mark.parametrize(
    "line",
    [
        'if (manifest.family->name() == std::string("tim")) return;',
        'return rule == "unipc" ? 3 : 1;',
        'switch_on(std::strcmp(name, "wan"));',
    ],
)
def test_a_comparison_would_be_noticed(line: str) -> None:
    assert words_in(line) and not words_in(f"int x;  // {line}")


def test_every_family_has_its_file_and_stands_in_the_list() -> None:
    listed = re.search(r"kFamilies\[\] = \{(.*)\};", (ROOT / "sampling" / "families.cpp").read_text())
    assert listed is not None
    assert [name.strip().removesuffix("_family") for name in listed[1].split(",")] == list(FAMILIES)
    assert all((ROOT / "sampling" / f"{name}.cpp").exists() for name in FAMILIES)


def test_a_floor_includes_only_those_below_it() -> None:
    wrong = []
    for path in ROOT.rglob("*.?pp"):
        own = FLOORS.index(path.relative_to(ROOT).parts[0])
        for floor, file in re.findall(r'#include "(\w+)/([\w.]+)"', path.read_text(encoding="utf-8")):
            if floor != "tmd" and FLOORS.index(floor) > own:
                wrong.append(f"{path.relative_to(ROOT)} includes {floor}/{file}")
    assert not wrong


def test_the_signatures_are_those_of_the_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SOURCES / "tools"))
    make_signatures = importlib.import_module("make_signatures")
    found = make_signatures.FILE.read_text(encoding="ascii")
    assert found == make_signatures.signatures_text(), "run runtime/cpp/tools/make_signatures.py"


def test_every_source_stands_in_the_build() -> None:
    build = (SOURCES / "CMakeLists.txt").read_text(encoding="utf-8")
    assert not [path.name for path in ROOT.rglob("*.cpp") if f"src/{path.relative_to(ROOT).as_posix()}" not in build]


def test_no_source_has_more_than_400_lines() -> None:
    long = {path.name: text for path in ROOT.rglob("*.?pp") if (text := path.read_text().count("\n")) > 400}
    assert not long
