"""The C++ library accepts and refuses the same bundles and manifests as Python: the same corpus, the same verdicts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.cpp_tools import BUNDLE, ROOT, program, twin
from tests.unit.test_manifest import parse, put, valid_document
from tmd_engines.manifest import GraphInfo, TensorSpec
from tmd_runtime.built_in import BUILT_IN

CORPUS = ("test_bundle.py", "test_bundle_graphs.py", "test_manifest.py")


def test_the_same_corpus_gets_the_same_verdicts() -> None:
    """Runs Python's own tests of bundles once more, with a plugin that asks both sides (tests/cpp_verdicts.py)."""
    program("tmd_twin")
    files = [str(ROOT / "tests" / "unit" / name) for name in CORPUS]
    command = [sys.executable, "-m", "pytest", "-p", "tests.cpp_verdicts", "-p", "no:cacheprovider", "-q", *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    counts = re.search(r"both sides accepted (\d+) and refused (\d+)", run.stdout)
    assert counts is not None and int(counts[1]) > 20 and int(counts[2]) > 300, run.stdout[-500:]


def test_a_valid_bundle_of_a_kind_that_is_not_run_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(BUILT_IN, bundle)
    document = json.loads((bundle / "manifest.json").read_text())
    document["model"] |= {
        "kind": "tim",
        "fusion": None,
        "rope": "index",
        "head_blocks": document["model"]["num_layers"],
    }
    document["sampler"] = {"rule": "flow_map", "steps": 4, "guidance": 2.5, "rho": 0.2}
    (bundle / "manifest.json").write_text(json.dumps(document))
    assert "ok" in twin().ask("bundle", path=str(bundle))
    command = [str(program("tmd_generate")), str(bundle), "a red circle", str(tmp_path / "x.rgb")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "is a Transition Model, which this library does not run yet" in run.stderr


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
