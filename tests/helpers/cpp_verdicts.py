"""A pytest plugin: whatever bundle or manifest a test opens in Python, the C++ library is asked too, and must agree.

    pytest -p tests.helpers.cpp_verdicts tests/unit/engines/test_bundle.py ...

So the corpus of broken bundles is written once, in the tests of the Python package, and new cases count for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.helpers import documents
from tests.helpers.cpp_tools import BUNDLE, twin
from tmd_engines import Bundle, BundleError, Manifest
from tmd_engines.bundle.manifest import parse_manifest

# These lower a limit inside the Python package, of which the other side cannot know.
OF_ONE_SIDE = {"test_oversized_graph_file", "test_too_many_nodes"}

asked = {"accepted": 0, "refused": 0}


def agree(answer: dict[str, Any], refused: BundleError | None) -> None:
    asked["refused" if refused else "accepted"] += 1
    if refused is None:
        assert "ok" in answer, f"only C++ refuses: {answer}"
    else:
        assert answer.get("status") == BUNDLE, f"only Python refuses: {refused} (C++: {answer})"
        assert "\n" not in answer["error"] and answer["error"].isascii() and len(answer["error"]) < 700


@pytest.fixture(autouse=True)
def both_sides(request: pytest.FixtureRequest) -> Iterator[None]:
    """Puts the question to C++ as well, wherever the test's module asks it."""
    if request.function.__name__ in OF_ONE_SIDE:
        yield
        return
    real_open = Bundle.open

    def open_both(folder: str | Path) -> Bundle:
        answer = twin().ask("bundle", path=str(folder))
        try:
            bundle = real_open(folder)
        except BundleError as error:
            agree(answer, error)
            raise
        agree(answer, None)
        return bundle

    def parse_both(data: bytes, where: str) -> Manifest:
        answer = twin().ask("manifest", data=data.hex())
        try:
            manifest = parse_manifest(data, where)
        except BundleError as error:
            agree(answer, error)
            raise
        agree(answer, None)
        return manifest

    with ExitStack() as stack:
        stack.enter_context(patch.object(Bundle, "open", staticmethod(open_both)))
        for module in (request.module, documents):
            if hasattr(module, "parse_manifest"):
                stack.enter_context(patch.object(module, "parse_manifest", parse_both))
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"both sides accepted {asked['accepted']} and refused {asked['refused']}")
