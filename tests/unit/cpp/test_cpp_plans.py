"""The C++ library looks for TensorRT's plans where Python puts them, under the same keys, and takes no others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.built_in import BUNDLES
from tests.helpers.cpp_tools import twin
from tests.helpers.synthetic import GRAPHS
from tmd_engines import Bundle
from tmd_engines.cache_folder import cache_folder
from tmd_engines.command.sizes import input_shapes, run_sizes
from tmd_engines.device.plan_cache import PlanCache
from tmd_engines.tensorrt.engine import TensorRtForRtxEngine
from tmd_engines.tensorrt.plans import plan_key
from tmd_engines.tensorrt.profile import exactly
from tmd_engines.tensorrt.settings import BuildSettings
from tmd_runtime.built_in import BUILT_IN

ENGINE = 3  # tmd_status
SIZE = (832, 480, 81)


GPU = ("NVIDIA H200", "9.0")


def python_key(graph: str, version: str = "10.16.1.11", **more: Any) -> dict[str, str]:
    """The key that `TensorRtEngine` gives to the plan of a graph of the built-in bundle."""
    bundle = Bundle.open(BUILT_IN)
    info = bundle.graph_info(graph)
    hashes = " ".join(bundle.manifest.files[name].sha256 for name in (info.file, info.data) if name)
    title = f"{bundle.manifest.model.name} {graph}"
    ranges = exactly(input_shapes(bundle, graph, run_sizes(bundle, graph, *SIZE)[0]))
    settings = BuildSettings(**more)
    return plan_key(title, hashes, b"lowered", f"tensorrt {version}", GPU, info.precision, ranges, settings)


def cpp_key(graph: str, version: str = "10.16.1.11", streaming: bool = False) -> dict[str, str]:
    bundle = Bundle.open(BUILT_IN)
    key: dict[str, str] = twin().ask(
        "plan_key",
        bundle=str(BUILT_IN),
        graph=graph,
        shapes=input_shapes(bundle, graph, run_sizes(bundle, graph, *SIZE)[0]),
        version=version,
        device=GPU[0],
        capability=GPU[1],
        streaming=streaming,
    )["ok"]
    return key


def find(folder: Path, key: dict[str, str]) -> Any:
    """The plan, or the error's text."""
    answer = twin().ask("plan_find", folder=str(folder), key=key)
    if "ok" in answer:
        return answer["ok"].encode("utf-8")
    assert answer["status"] == ENGINE
    return answer["error"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("graph", GRAPHS)
def test_key_is_that_of_python_but_for_the_lowered_graph(graph: str, streaming: bool) -> None:
    expected = python_key(graph, weight_streaming=streaming)
    del expected["lowered"]
    assert cpp_key(graph, streaming=streaming) == expected


@pytest.mark.parametrize("title", ["wan1.3b backbone", 'a "quoted" \\ name', "büro 北京 \U0001f600\x7f"])
def test_entry_of_a_key_has_the_name_that_python_gives_it(tmp_path: Path, title: str) -> None:
    key = python_key("backbone") | {"title": title}
    PlanCache(tmp_path / "plans").store(key, b"plan")
    (entry,) = (tmp_path / "plans").glob("*.plan")
    assert twin().ask("plan_file", key=key)["ok"] == entry.name
    wanted = {name: value for name, value in key.items() if name != "lowered"}
    assert find(tmp_path / "plans", wanted) == b"plan"


def test_folder_is_that_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMD_CACHE", str(tmp_path))
    assert twin().ask("plan_cache", cache=str(tmp_path))["ok"] == str(cache_folder() / "tensorrt")  # type: ignore[operator]
    monkeypatch.delenv("TMD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")  # both then ask the system whose process this is
    assert twin().ask("plan_cache", cache="")["ok"] == str(cache_folder() / "tensorrt")  # type: ignore[operator]


def test_newest_plan_counts_whatever_lowered_it_and_however_much_room_it_had(tmp_path: Path) -> None:
    plans = PlanCache(tmp_path / "plans")
    first = python_key("backbone", workspace=4 << 30)
    plans.store(first, b"old")
    (entry,) = (tmp_path / "plans").glob("*.plan")
    os.utime(entry, (1, 1))
    assert find(tmp_path / "plans", cpp_key("backbone")) == b"old"
    plans.store(first | {"lowered": "0" * 64}, b"new\n{}\0")
    assert find(tmp_path / "plans", cpp_key("backbone")) == b"new\n{}\0"


@pytest.mark.parametrize("version", ["10.3.0", "10.3.0.26", "10.3.0.26.post1"])
def test_a_package_may_leave_out_the_build_number(tmp_path: Path, version: str) -> None:
    PlanCache(tmp_path / "plans").store(python_key("backbone", version), b"plan")
    assert find(tmp_path / "plans", cpp_key("backbone", "10.3.0.26")) == b"plan"
    for other in ("10.3.1.26", "10.30.0.26", *(["10.3.0.2"] if "26" in version else [])):
        assert "engine: tensorrt 10.3.0" in find(tmp_path / "plans", cpp_key("backbone", other))


@pytest.mark.parametrize(
    ("field", "there"),
    [
        ("graph", "ab cd"),
        ("device", "Orin"),
        ("compute capability", "8.7"),
        ("precision", "fp8"),
        ("flags", "workspace None, weight streaming True, no TF32"),
        ("surprise", "yes"),
    ],
)
def test_plan_for_something_else_is_not_taken_and_the_field_is_named(tmp_path: Path, field: str, there: str) -> None:
    PlanCache(tmp_path / "plans").store(python_key("backbone") | {field: there}, b"plan")
    said = find(tmp_path / "plans", cpp_key("backbone"))
    assert f"{field}: {there} there, {cpp_key('backbone').get(field, 'nothing')}"[:75] in said
    assert "tmd-engine build BUNDLE --engine tensorrt --size" in said


def test_another_size_is_missing_without_a_complaint_about_fields(tmp_path: Path) -> None:
    key = python_key("backbone") | {"shapes": "x 1x16x5x8x8"}
    PlanCache(tmp_path / "plans").store(key, b"plan")
    said = find(tmp_path / "plans", cpp_key("backbone"))
    assert said.startswith("there is no plan of 'tiny backbone' for 'prompt_embeds 1x") and "there," not in said


def test_damaged_renamed_and_linked_entries_are_none(tmp_path: Path) -> None:
    folder, key = tmp_path / "plans", cpp_key("backbone")
    PlanCache(folder).store(python_key("backbone"), b"plan")
    (entry,) = folder.glob("*.plan")
    content = entry.read_bytes()
    for damaged in (
        content[:-1],
        content + b"!",
        content[:-1] + b"N",
        content.replace(b'"size": 4', b'"size":4'),
        b"[]\n",
    ):
        entry.write_bytes(damaged)
        assert "there is no plan" in find(folder, key)
    entry.write_bytes(content)
    renamed = entry.rename(folder / f"{'0' * 64}.plan")
    assert "there is no plan" in find(folder, key)
    entry.symlink_to(renamed)
    assert "there is no plan" in find(folder, key)
    entry.unlink()
    renamed.rename(entry)
    assert find(folder, key) == b"plan"
    folder.chmod(0o777)
    assert "can be written by others" in find(folder, key)


@pytest.mark.parametrize("name", ["tiny", "tim-tiny"])
def test_the_weights_of_a_stage_are_those_that_python_counts(name: str) -> None:
    """By them plans stream their weights; one decoder's are not all that its stage has on the GPU."""
    bundle = Bundle.open(BUNDLES / name)
    for graph in bundle.manifest.graphs:
        together = [bundle.graph_info(each) for each in TensorRtForRtxEngine.beside(bundle, graph)]
        files = [file for info in together for file in (info.file, info.data) if file]
        size = sum(bundle.manifest.files[file].size for file in files)
        assert twin().ask("plan_bytes_together", bundle=str(bundle.folder), graph=graph)["ok"] == size
