"""Thousands of damaged graphs and manifests, by a seed: the C++ library and Python accept and refuse the same ones.

`TMD_FUZZ_CASES=100000 pytest tests/unit/cpp/test_cpp_mutations.py` tries more of them than the 2,000 of each run.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import onnx
import pytest

from tests.helpers.built_in import BUNDLES
from tests.helpers.cpp_mutations import Part, changed, graph_parts, parts_of
from tests.helpers.cpp_tools import BUNDLE, twin
from tmd_engines import BundleError
from tmd_engines.bundle.geometry import DENOISER, facts
from tmd_engines.bundle.graph_file import check_graph, parse_graph
from tmd_engines.bundle.manifest import Manifest, parse_manifest

CASES = int(os.environ.get("TMD_FUZZ_CASES", "2000"))
GRAPHS = [("tiny", "text_encoder"), ("tiny", "update"), ("tiny", "flow_head"), ("tim-tiny", "backbone")]
NOT_CANONICAL = "not an ONNX file"


def python_refusal(data: bytes, manifest: Manifest, name: str) -> str:
    """NOT_CANONICAL, another reason, or nothing."""
    info = manifest.graphs[name]
    try:
        model = parse_graph(data, info.file)
    except BundleError:
        return NOT_CANONICAL
    try:
        check_graph(model, info, manifest.files[info.data].size if info.data else 0, info.file)
    except BundleError as error:
        return str(error)
    return ""


def plain_facts(data: bytes, manifest: Manifest, name: str) -> list[Any]:
    """What a graph says of patches and blocks, as JSON has it."""
    found = facts(parse_graph(data, "it.onnx"), manifest.graphs[name])
    return [[sorted(side) for side in found.divisors], found.attentions]


@pytest.mark.long
@pytest.mark.parametrize(("bundle", "name"), GRAPHS, ids=["-".join(which) for which in GRAPHS])
def test_changed_graphs_get_the_same_verdicts(bundle: str, name: str) -> None:
    document = (BUNDLES / bundle / "manifest.json").read_bytes()
    manifest = parse_manifest(document, "manifest.json")
    whole = graph_parts((BUNDLES / bundle / manifest.graphs[name].file).read_bytes())
    rng = random.Random(f"{bundle} {name}")
    verdicts: Counter[str] = Counter()
    left = CASES // len(GRAPHS)
    while left > 0:
        batch = [changed(whole, rng) for _ in range(min(left, 100))]
        left -= len(batch)
        question = {"manifest": document.hex(), "graph": name, "data": [data.hex() for data in batch]}
        answers = twin().ask("graphs", **question)["ok"]
        accepted: list[bytes] = []
        for data, answer in zip(batch, answers, strict=True):
            refusal = python_refusal(data, manifest, name)
            same = bool(answer) == bool(refusal) and (NOT_CANONICAL in answer) == (NOT_CANONICAL in refusal)
            assert same, f"C++: {answer or 'accepted'}; Python: {refusal or 'accepted'}; {data.hex()}"
            assert answer.isascii() and "\n" not in answer and len(answer) < 700
            if not refusal and name in DENOISER:
                accepted.append(data)
            verdicts[NOT_CANONICAL if refusal == NOT_CANONICAL else "refused" if refusal else "accepted"] += 1
        told = twin().ask("facts", **{**question, "data": [data.hex() for data in accepted]})["ok"]
        assert told == [plain_facts(data, manifest, name) for data in accepted]
    assert min(verdicts[kind] for kind in (NOT_CANONICAL, "refused", "accepted")) > CASES // len(GRAPHS) // 50, verdicts


def test_the_mutations_begin_with_the_very_file() -> None:
    for file in sorted(BUNDLES.glob("*/*.onnx")):
        parts = graph_parts(file.read_bytes())
        assert b"".join(part.written() for part in parts.inside or []) == file.read_bytes()


def depth(levels: int) -> bytes:
    """A model of as many messages inside one another as `levels`, the outermost not counted."""
    path = [7, 11, 2, *[4, 1] * 60][:levels]
    part = Part(path[-1], 2)
    for number in reversed(path[:-1]):
        part = Part(number, 2, inside=[part])
    return part.written()


def test_messages_are_read_as_deep_as_protobuf_reads_them() -> None:
    document = (BUNDLES / "tiny" / "manifest.json").read_bytes()
    refused = {}
    for levels in range(95, 106):
        answer = twin().ask("graphs", manifest=document.hex(), graph="update", data=[depth(levels).hex()])["ok"][0]
        refused[levels] = NOT_CANONICAL in answer
        try:
            parse_graph(depth(levels), "it.onnx")
        except BundleError:
            assert refused[levels], levels
        else:
            assert not refused[levels], levels
    assert set(refused.values()) == {False, True}
    assert parts_of(depth(3), onnx.ModelProto.DESCRIPTOR)


BYTES_OF_JSON = [b"\0", b"\xff", b" ", b"\t", b"\v", b"\f", b"\xc2\xa0", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b",",
                 b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"\\ud83d\\ude00", b"0", b"-", b"1", b".5", b"e2", b"E400",
                 b"+", b"null", b"true", b"NaN", b"Infinity", b"-0", b"1.0", b"99999999999999999999", b"/**/", b"#",
                 b"'", b"\n"]  # fmt: skip


def changed_text(data: bytes, rng: random.Random) -> bytes:
    """A manifest with a few bytes taken out, put in, or both; seldom at its very ends."""
    begin = rng.choice((0, len(data), *[rng.randrange(len(data)) for _ in range(8)]))
    end = begin + rng.choice((0, 0, 1, 2, 5))
    return data[:begin] + b"".join(rng.choices(BYTES_OF_JSON, k=rng.choice((0, 1, 1, 2)))) + data[end:]


def test_changed_manifests_get_the_same_verdicts() -> None:
    rng = random.Random(3)
    documents = [(BUNDLES / name / "manifest.json").read_bytes() for name in ("tiny", "tim-tiny")]
    accepted = 0
    for case in range(CASES // 2):
        data = changed_text(documents[case % 2], rng)
        answer: dict[str, Any] = twin().ask("manifest", data=data.hex())
        try:
            parse_manifest(data, "manifest.json")
        except BundleError as error:
            assert answer.get("status") == BUNDLE, f"only Python refuses: {error}; {data!r}"
        else:
            assert "ok" in answer, f"only C++ refuses: {answer}; {data!r}"
            accepted += 1
    assert accepted > CASES // 50


@pytest.mark.parametrize("tail", [b"\0", b"\0{}", b" \0 more", b"{}", b"x", b"\xff", b"\x1a"])
def test_nothing_may_follow_a_manifest(tail: bytes) -> None:
    data = (BUNDLES / "tiny" / "manifest.json").read_bytes() + tail
    with pytest.raises(BundleError):
        parse_manifest(data, "manifest.json")
    assert twin().ask("manifest", data=data.hex())["status"] == BUNDLE
