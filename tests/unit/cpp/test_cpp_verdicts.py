"""The C++ library accepts and refuses the same bundles and manifests as Python: the same corpus, the same verdicts."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args

import pytest

from tests.helpers.cpp_tools import BUNDLE, ROOT, program, twin
from tests.helpers.cpp_verdicts import agree
from tests.helpers.documents import parse, put, valid_document, valid_tim_document, valid_wan_document
from tests.helpers.synthetic import GRAPHS, SECOND, flow_map_sampler, velocity_sampler, write_synthetic_bundle
from tests.helpers.synthetic_tim import write_plain_bundle, write_tim_bundle
from tmd_engines import BundleError
from tmd_engines.bundle.families.rules import RULES
from tmd_engines.bundle.families.tim import TIM
from tmd_engines.bundle.families.tmd import TMD
from tmd_engines.bundle.families.wan import WAN
from tmd_engines.bundle.manifest import GraphInfo, parse_manifest

CORPUS = ("test_bundle.py", "test_bundle_graphs.py", "test_interfaces.py", "test_manifest.py", "test_operators.py")


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
    assert counts is not None and int(counts[1]) > 150 and int(counts[2]) > 900, run.stdout[-500:]


def words_of(annotation: Any) -> set[str]:
    """The strings of a Literal, inside an optional one too."""
    inner = {word for part in get_args(annotation) if not isinstance(part, str) for word in words_of(part)}
    return inner | {word for word in get_args(annotation) if isinstance(word, str)}


WORDS = [
    (valid_document, GraphInfo, "precision", "graphs/backbone/precision"),
    (valid_document, GraphInfo, "storage", "graphs/backbone/storage"),
    (valid_document, TMD.model, "fusion", "model/fusion"),
    (valid_tim_document, TIM.model, "rope", "model/rope"),
    (valid_wan_document, WAN.sampler, "time_rounding", "sampler/time_rounding"),
]


@pytest.mark.parametrize(("document", "model", "field", "path"), WORDS, ids=[path for *_, path in WORDS])
def test_every_word_that_python_knows_is_known(
    document: Callable[[], dict[str, Any]], model: Any, field: str, path: str
) -> None:
    """A word that is added to the schema on one side only is noticed."""
    check_words(document, path, words_of(model.model_fields[field].annotation))


def test_every_rule_that_python_knows_is_known() -> None:
    check_words(valid_wan_document, "sampler/rule", set(RULES))


def check_words(make: Callable[[], dict[str, Any]], path: str, words: set[str]) -> None:
    assert len(words) > 1
    for word in (*words, "magic"):
        document = make()
        put(document, path, word)
        answer = twin().ask("manifest", data=json.dumps(document).encode().hex())
        if word == "magic":
            assert answer["status"] == BUNDLE
        else:
            parse(document)
            assert "ok" in answer, (word, answer)


def test_the_first_schema_is_refused_with_what_to_do() -> None:
    answer = twin().ask("manifest", data=json.dumps({**valid_document(), "schema_version": 1}).encode().hex())
    assert answer["status"] == BUNDLE
    assert "has schema_version '1'" in answer["error"] and "with tmd-export" in answer["error"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The manifests of whole bundles, with every graph that there is."""
    folder = tmp_path_factory.mktemp("whole")
    bundles = {
        "tmd": write_synthetic_bundle(folder / "tmd"),
        "wan": write_synthetic_bundle(folder / "wan", sampler=velocity_sampler()),
        "anyflow": write_synthetic_bundle(folder / "anyflow", sampler=flow_map_sampler()),
        "two": write_synthetic_bundle(folder / "two", (*GRAPHS, *SECOND), velocity_sampler(boundary=0.875)),
        "held": write_synthetic_bundle(folder / "held", ("encoder", *GRAPHS), velocity_sampler(), holds=True),
        "tim": write_tim_bundle(folder / "tim", pictures=True),
        "classes": write_tim_bundle(folder / "classes", classes=True),
        "plain": write_plain_bundle(folder / "plain"),
    }
    return {name: json.loads((path / "manifest.json").read_text()) for name, path in bundles.items()}


ACCEPTED: list[dict[str, Any]] = [
    {"boundary": 1.0, "guidance_2": 1.0},
    {"guidance": 4.0, "guidance_2": 0.0},
    {"guidance_2": None},
]
REFUSED: list[dict[str, Any]] = [
    {"boundary": None},
    {"boundary": 0.0},
    {"boundary": 1.01},
    {"boundary": "0.5"},
    {"guidance_2": 3.0},
    {"guidance": 4.0, "guidance_2": 1.0},
    {"guidance_2": -1.0},
    {"boundary": None, "guidance_2": 1.0},
]


@pytest.mark.parametrize("changes", ACCEPTED + REFUSED)
def test_samplers_of_two_transformers_get_the_same_verdicts(
    changes: dict[str, Any], documents: dict[str, dict[str, Any]]
) -> None:
    document = copy.deepcopy(documents["two"])
    document["sampler"] |= changes
    assert both_accept(document) == (changes in ACCEPTED)


@pytest.mark.parametrize("value", [True, False, None, 1, "true"])
@pytest.mark.parametrize("name", ["held", "wan", "anyflow", "tim"])
def test_a_first_frame_needs_the_family_and_the_graphs_for_it(
    name: str, value: object, documents: dict[str, dict[str, Any]]
) -> None:
    document = copy.deepcopy(documents[name])
    document["model"]["first_frame"] = value
    assert both_accept(document) == (value is {"held": True, "wan": False}.get(name, "never"))


def both_accept(document: dict[str, Any]) -> bool:
    """The verdict of Python, which must be that of C++."""
    data = json.dumps(document).encode()
    answer = twin().ask("manifest", data=data.hex())
    try:
        parse_manifest(data, "manifest.json")
    except BundleError as error:
        agree(answer, error)
        return False
    agree(answer, None)
    return True


NAMED = ("batch", "frames", "height", "width", "tokens", "text", "words", "1*height", "8*width")
DIMENSIONS = (1, 2, 3, 8, 16, 32, 64, *NAMED)


def change_interface(document: dict[str, Any], rng: random.Random) -> None:
    """One change of a graph, or of a size that graphs are made of."""
    graph = rng.choice(list(document["graphs"].values()))
    side = rng.choice(("inputs", "outputs"))
    spec = rng.choice(graph[side])
    choice = rng.randrange(9)
    if choice == 0:
        spec["dtype"] = rng.choice(("float32", "float16", "int64", "int32", "uint8"))
    elif choice <= 3 and spec["shape"]:
        spec["shape"][rng.randrange(len(spec["shape"]))] = rng.choice(DIMENSIONS)
    elif choice == 4:
        spec["shape"].insert(rng.randrange(len(spec["shape"]) + 1), rng.choice(DIMENSIONS))
    elif choice == 5:
        spec["name"] = rng.choice((spec["name"] + "_next", "cache_00", "x", "labels", "token_embeds"))
    elif choice == 6:
        graph[side].remove(spec)
    elif choice == 7:
        part, field = rng.choice((("text", "dim"), ("model", "dim"), ("latents", "temporal_stride")))
        document[part][field] = rng.choice((document[part][field], 2, 64))
    else:
        name = rng.choice(list(document["graphs"]))
        document["graphs"][rng.choice(("encoder", "update", "backbone", "upscaler"))] = document["graphs"].pop(name)


def test_interfaces_changed_at_random_get_the_same_verdicts(documents: dict[str, dict[str, Any]]) -> None:
    rng = random.Random(11)
    accepted = 0
    for name in list(documents) * 60:
        document = copy.deepcopy(documents[name])
        change_interface(document, rng)
        accepted += both_accept(document)
    assert 20 < accepted < 150
