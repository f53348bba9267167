"""A folder of plans made ahead of time gets the same verdict from the C++ library as from Python, in the same words."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.helpers.cpp_tools import twin
from tmd_engines import EngineError
from tmd_engines.device.plan_cache import PlanCache
from tmd_engines.tensorrt.folder import PlanFolder, PlanFolderWriter
from tmd_engines.tensorrt.profile import contains, exactly, from_text, to_text
from tmd_engines.tensorrt.targets import KNOWN, parse_targets, refusal_on, runs_on

ENGINE = 3  # tmd_status
GPU = ("NVIDIA GeForce RTX 4090", (8, 9))
CONTENT = b"the plan"
SHAPES = {"t": (1,), "x": (1, 16, 5, 8, 8)}
WANTED = {
    "title": "tiny backbone",
    "graph": "ab cd",
    "engine": "tensorrt-rtx 1.7.1.116",
    "device": "any",
    "compute capability": "rtx",
    "precision": "bf16",
    "shapes": to_text(exactly(SHAPES)),
    "flags": "workspace None, weight streaming False, no TF32",
}
LOWERED = {"lowered": "0" * 64}


def write(
    content: bytes, key: dict[str, str], figures: dict[str, int], out: BinaryIO
) -> tuple[dict[str, str], dict[str, int]]:
    out.write(content)
    return {name: value for name, value in key.items() if value}, figures


def make(folder: Path, *changes: dict[str, str], content: bytes = CONTENT) -> Path:
    """A folder as `tmd-engine build --out` leaves it, with a plan per change of the key."""
    with PlanFolderWriter(folder) as plans:
        for number, change in enumerate(changes or ({},)):
            key = {**WANTED, **LOWERED, **change}

            figures = {"scratch": 100 + number, "weights": 7}
            plans.add(f"backbone-{number}.plan", partial(write, content, key, figures))
    return folder


def by_python(folder: Path, gpu: tuple[str, tuple[int, int]] = GPU) -> dict[str, Any]:
    """What `GraphPlans.in_folder` makes of the plans in the folder, for the key `WANTED`."""
    try:
        plans = PlanFolder(folder)
        device = (gpu[0], f"{gpu[1][0]}.{gpu[1][1]}")
        closest: list[str] | None = None
        for entry in plans.entries:
            if entry.key.get("title") != WANTED["title"] or not _takes(entry.key.get("shapes", "")):
                continue
            here = {**WANTED, **LOWERED, "shapes": entry.key["shapes"]}
            found = plans.differences(entry, here, device)
            if not found:
                return {"ok": bytes(plans.read(entry)).decode(), "key": entry.key}
            if closest is None or len(found) < len(closest):
                closest = found
        if closest is None:
            raise EngineError(f"{folder} has no plan of {WANTED['title']} for {WANTED['shapes']}")
        raise EngineError(f"the plan of {WANTED['title']} in {folder} is for something else ({'; '.join(closest[:2])})")
    except EngineError as error:
        return {"error": str(error), "status": ENGINE}


def _takes(text: str) -> bool:
    try:
        return contains(from_text(text), SHAPES)
    except ValueError:
        return False


def by_cpp(folder: Path, gpu: tuple[str, tuple[int, int]] = GPU) -> dict[str, Any]:
    return twin().ask("plan_in_folder", folder=str(folder), key=WANTED, gpu=list(gpu[1]))


def said(folder: Path, gpu: tuple[str, tuple[int, int]] = GPU) -> dict[str, Any]:
    """The answer of both, which is the same."""
    ours, theirs = by_python(folder, gpu), by_cpp(folder, gpu)
    assert ours == theirs
    return ours


@pytest.mark.parametrize("targets", ["rtx", "8.9", "8.6,8.9", " RTX ", "8.9, 12.0"])
def test_plan_of_a_folder_is_taken_on_a_card_that_it_is_for(tmp_path: Path, targets: str) -> None:
    answer = said(make(tmp_path / "plans", {"compute capability": targets}))
    assert answer["ok"] == CONTENT.decode() and answer["key"]["compute capability"] == targets


@pytest.mark.parametrize(
    ("field", "there"),
    [
        ("compute capability", "8.6,12.0"),
        ("compute capability", "9.9"),
        ("compute capability", ""),
        ("graph", "other"),
        ("graph", "e" * 64 + " " + "f" * 64),
        ("engine", "tensorrt-rtx 1.8.0.1"),
        ("engine", "tensorrt 11.1.0"),
        ("device", "NVIDIA H200"),
        ("precision", "fp8"),
        ("precision", ""),
        ("flags", "workspace None, weight streaming True, no TF32"),
        ("surprise", "a 'quoted' \x07 word"),
    ],
)
def test_every_field_that_differs_is_named(tmp_path: Path, field: str, there: str) -> None:
    folder = make(tmp_path / "plans", {field: there}, {field: there, "precision": "int8"})
    answer = said(folder) if "quoted" not in there else by_cpp(folder)  # the escapes of the two look different
    assert f"the plan of tiny backbone in {folder} is for something else ({field}: " in answer["error"]


def test_a_key_without_the_lowered_graph_is_no_key(tmp_path: Path) -> None:
    folder = make(tmp_path / "plans", {"lowered": ""})
    assert "(lowered: nothing there, " in by_python(folder)["error"]
    assert "(lowered: nothing there, " in by_cpp(folder)["error"]


def test_plans_of_another_version_of_tmd_are_named_where_the_lowered_graph_is_not_known(tmp_path: Path) -> None:
    """Python compares the lowered graph itself; C++ lowers nothing, and compares what it follows from."""
    folder = make(tmp_path / "plans")
    document = json.loads((folder / "manifest.json").read_text())
    for made_by, shown in (("tmd-engine 9.8.7", "tmd-engine 9.8.7"), (None, "nothing"), (7, "nothing")):
        changed = {**document, "made_by": made_by}
        if made_by is None:
            del changed["made_by"]
        (folder / "manifest.json").write_text(json.dumps(changed))
        assert f"(made by: {shown} there, tmd-engine 0.1.0 here)" in by_cpp(folder)["error"]


@pytest.mark.parametrize(
    ("shapes", "takes"),
    [
        ("t 1, x 1x16x5x8x8", True),
        ("t 1, x 1x16x1x4x4..1x16x5x8x8..1x16x9x16x16", True),
        ("t 1, x 1x16x1x4x4..1x16x5x8x8..1x16x9x16x7", False),
        ("t 1, x 1x16x6x4x4..1x16x7x8x8..1x16x9x16x16", False),
        ("x 1x16x5x8x8", False),
        ("t 1, x 1x16x5x8", False),
        ("t 1, x 1x16x5x8x8..1x16x9x16x16", False),
        ("t 1, x 1x16x1..1x16x5x8x8..1x16x9x16x16", False),
        ("t 1, x ax16x5x8x8", False),
        ("t 1, x", False),
        ("", False),
    ],
)
def test_a_plan_takes_the_sizes_of_its_range(tmp_path: Path, shapes: str, takes: bool) -> None:
    folder = make(tmp_path / "plans", {"shapes": shapes})
    answer = said(folder)
    assert ("ok" in answer) == takes
    assert takes or answer["error"] == f"{folder} has no plan of tiny backbone for t 1, x 1x16x5x8x8"


def test_of_several_plans_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    folder = make(
        tmp_path / "plans", {"title": "tiny update"}, {"precision": "fp8"}, {"compute capability": "12.0"}, {}
    )
    assert said(folder)["ok"] == CONTENT.decode()
    assert "12.0 there, 8.9 here" in said(make(tmp_path / "more", {"compute capability": "12.0"}))["error"]
    assert "ok" in said(tmp_path / "more", ("NVIDIA GeForce RTX 5090", (12, 0)))
    assert "ok" in said(tmp_path / "more", ("a later one", (13, 0)))


def test_plan_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "plans")
    plan = folder / "backbone-0.plan"
    for content, words in (
        (b"", "has 0 bytes, and the manifest says 8: the copy is incomplete"),
        (CONTENT[:-1], "has 7 bytes"),
        (CONTENT[:-1] + b"!", "is not what its manifest says (sha256): copy the folder again."),
    ):
        plan.write_bytes(content)
        assert words in said(folder)["error"]
    plan.rename(folder / "elsewhere")
    assert "cannot be read: " in said(folder)["error"]
    plan.symlink_to(folder / "elsewhere")
    assert "is a symbolic link" in said(folder)["error"]
    plan.unlink()
    plan.mkdir()
    assert "is not a regular file" in said(folder)["error"]


def test_what_is_no_folder_of_plans_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "file"):
        for answer in (by_python(path), by_cpp(path)):
            assert answer["error"].startswith(f"{path} is not a folder of plans (") and "--out PLANS" in answer["error"]
    folder = make(tmp_path / "plans")
    manifest = (folder / "manifest.json").read_text()
    for version in (2, 0, "1", 1.0, True, None, [1]):
        (folder / "manifest.json").write_text(
            manifest.replace('"schema_version": 1', f'"schema_version": {json.dumps(version)}')
        )
        for answer in (by_python(folder), by_cpp(folder)):
            assert "has schema_version" in answer["error"] and "build the plans again" in answer["error"]


def _set(place: tuple[str | int, ...], value: Any, document: Any) -> None:
    for step in place[:-1]:
        document = document[step]
    document[place[-1]] = value


def _drop(place: tuple[str | int, ...], document: Any) -> None:
    for step in place[:-1]:
        document = document[step]
    del document[place[-1]]


def _append(value: Any, document: Any) -> None:
    document["plans"].append(value)


def changes() -> list[Callable[[dict[str, Any]], Any]]:
    """What can be wrong with an entry, or with the document around it."""
    values: tuple[Any, ...] = (
        None,
        True,
        0,
        -1,
        1 << 41,
        1 << 70,
        1.5,
        "",
        "x",
        [],
        {},
        ["x"],
        {"x": None},
        {"x": 1},
        {"x": "y"},
    )
    names = ("../x", "a/b", "a\\b", "/x", "..", ".", ".x", "-x", "x\0", "manifest.json", "x" * 129, "é")
    hashes = ("0" * 63, "0" * 65, "A" * 64, "g" * 64)
    made: list[Callable[[dict[str, Any]], Any]] = []
    for field in ("file", "size", "sha256", "key", "figures"):
        made += [partial(_set, ("plans", 0, field), value) for value in values]
        made.append(partial(_drop, ("plans", 0, field)))
    made += [partial(_set, ("plans", 0, "file"), name) for name in names]
    made += [partial(_set, ("plans", 0, "sha256"), digits) for digits in hashes]
    for place in (("plans", 0, "figures", "scratch"), ("plans", 0, "key", "graph"), ("plans",)):
        made += [partial(_set, place, value) for value in values]
    made += [partial(_append, value) for value in values]
    return made


def verdicts_agree(folder: Path) -> dict[str, Any]:
    """Has both read the manifest, with one result."""
    theirs = twin().ask("plan_folder", folder=str(folder))
    try:
        plans = PlanFolder(folder)
    except EngineError:
        assert theirs["status"] == ENGINE
    else:
        assert theirs["ok"] == [list(entry) for entry in plans.entries]
        assert theirs["scratch"] == max((entry.figures.get("scratch", 0) for entry in plans.entries), default=0)
    return theirs


def test_manifests_get_the_same_verdict(tmp_path: Path) -> None:
    folder = make(tmp_path / "plans", {}, {"precision": "fp8"})
    document = json.loads((folder / "manifest.json").read_text())
    counts = {True: 0, False: 0}
    for change in changes():
        changed = copy.deepcopy(document)
        change(changed)
        (folder / "manifest.json").write_text(json.dumps(changed))
        theirs = verdicts_agree(folder)
        assert "ok" in theirs or theirs["error"] == by_python(folder)["error"]
        counts["ok" in theirs] += 1
    assert counts[True] > 8 and counts[False] > 120


def test_damaged_json_gets_the_same_verdict(tmp_path: Path) -> None:
    folder = make(tmp_path / "plans")
    manifest, random_bytes = (folder / "manifest.json").read_bytes(), random.Random(5)
    for text in (
        b"",
        b"[]",
        b"{}",
        b"1",
        b"\xff",
        b"{} x",
        manifest + b"]",
        manifest.replace(b'"plans"', b'"plans": [], "plans"'),
    ):
        (folder / "manifest.json").write_bytes(text)
        assert {"error"} <= by_cpp(folder).keys() and "is not a folder of plans" in by_python(folder)["error"]
    for _ in range(200):
        damaged = bytearray(manifest)
        damaged[random_bytes.randrange(len(damaged))] = random_bytes.randrange(256)
        (folder / "manifest.json").write_bytes(damaged)
        verdicts_agree(folder)


def test_which_cards_a_plan_is_for() -> None:
    cards = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1), (13, 0)]
    for stated in ("rtx", *KNOWN, "8.9,12.0", "8.0, 8.6", "9.0", "8.9,9.0", "8.9,", "", "12.1"):
        for card in cards:
            try:
                expected = runs_on(parse_targets(stated), card)
            except EngineError:
                expected = stated == f"{card[0]}.{card[1]}"
            assert twin().ask("plan_runs_on", stated=stated, gpu=list(card))["ok"] == expected, (stated, card)
    for precision in ("fp32", "fp16", "bf16", "int8", "fp8"):
        for card in cards:
            assert twin().ask("plan_refusal", precision=precision, gpu=list(card))["ok"] == (
                refusal_on(precision, card) or ""
            )


def test_kernels_are_kept_where_python_keeps_them(tmp_path: Path) -> None:
    """Both find what the other has kept, complete and only in a folder that nobody else can write."""
    key = {**WANTED, **LOWERED, "title": "kernels of tiny backbone", "plan for": WANTED["shapes"]}
    folder = tmp_path / "cache" / "tmd" / "tensorrt"
    twin().ask("plan_store", folder=str(folder), key=key, content="kernels")
    assert folder.stat().st_mode & 0o777 == 0o700
    (entry,) = folder.iterdir()
    assert entry.stat().st_mode & 0o777 == 0o600
    assert PlanCache(folder).load(key) == b"kernels"
    assert twin().ask("plan_load", folder=str(folder), key=key)["ok"] == "kernels"
    PlanCache(folder).store(key, b"newer kernels")
    assert twin().ask("plan_load", folder=str(folder), key=key)["ok"] == "newer kernels"
    assert twin().ask("plan_load", folder=str(folder), key={**key, "device": "another"})["ok"] is None
    entry.write_bytes(entry.read_bytes()[:-1])
    assert twin().ask("plan_load", folder=str(folder), key=key)["ok"] is None
    folder.chmod(0o770)
    twin().ask("plan_store", folder=str(folder), key=key, content="kernels")
    PlanCache(folder).store(key, b"kernels")
    assert list(folder.iterdir()) == [entry] and not entry.read_bytes().endswith(b"kernels")


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / "tensorrt"
    folder.mkdir(mode=0o700)
    left, living = folder / ".new-0123456789ab.part", folder / ".new-ba9876543210.part"
    left.write_text("half")
    other = folder / ".new-.part.notes"
    other.write_text("not ours")
    with open(living, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        twin().ask("plan_store", folder=str(folder), key=WANTED, content="kernels")
        assert not left.exists() and living.exists() and other.exists()


def test_the_hash_of_a_stored_entry_is_that_of_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "tensorrt"
    twin().ask("plan_store", folder=str(folder), key=WANTED, content="line one\nline two")
    (entry,) = folder.iterdir()
    line, _, content = entry.read_bytes().partition(b"\n")
    assert content == b"line one\nline two" and json.loads(line) == {
        "key": WANTED,
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
    }
