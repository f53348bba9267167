"""The C++ library accepts and refuses the same bundles and manifests as Python: the same corpus, the same verdicts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any, get_args

import pytest

from tests.helpers.cpp_tools import BUNDLE, ROOT, program, twin
from tests.helpers.documents import parse, put, valid_document
from tmd_engines.bundle.manifest import GraphInfo, TensorSpec

CORPUS = ("test_bundle.py", "test_bundle_graphs.py", "test_manifest.py")


def test_the_same_corpus_gets_the_same_verdicts() -> None:
    """Runs Python's own tests of bundles with a plugin that asks both sides (tests/helpers/cpp_verdicts.py)."""
    program("tmd_twin")
    files = [str(ROOT / "tests" / "unit" / "engines" / name) for name in CORPUS]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.helpers.cpp_verdicts",
        "-p",
        "no:cacheprovider",
        "-q",
        *files,
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    counts = re.search(r"both sides accepted (\d+) and refused (\d+)", run.stdout)
    assert counts is not None and int(counts[1]) > 20 and int(counts[2]) > 300, run.stdout[-500:]


def words_of(annotation: Any) -> set[str]:
    """The strings of a Literal, inside an optional one too."""
    inner = {word for part in get_args(annotation) if not isinstance(part, str) for word in words_of(part)}
    return inner | {word for word in get_args(annotation) if isinstance(word, str)}


@pytest.mark.parametrize(
    ("model", "field", "path"),
    [
        (GraphInfo, "precision", "graphs/backbone/precision"),
        (GraphInfo, "storage", "graphs/backbone/storage"),
        (TensorSpec, "dtype", "graphs/backbone/inputs/0/dtype"),
    ],
)
def test_every_word_that_python_knows_is_known(model: Any, field: str, path: str) -> None:
    """A word that is added to the schema on one side only is noticed."""
    words = words_of(model.model_fields[field].annotation)
    assert len(words) > 1
    for word in (*words, "magic"):
        document = valid_document()
        put(document, path, word)
        answer = twin().ask("manifest", data=json.dumps(document).encode().hex())
        if word == "magic":
            assert answer["status"] == BUNDLE
        else:
            parse(document)
            assert "ok" in answer, (word, answer)
