"""`tmd-engine` as a new user types it: built-in bundles by name, engines that are missing, and seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.helpers.built_in import BUILT_IN
from tmd_engines import Bundle
from tmd_engines.command.cli import main
from tmd_engines.command.sizing_table import format_seconds
from tmd_engines.cost import speed


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize("name", ["builtin:tiny", "builtin:tim-tiny"])
@pytest.mark.parametrize("command", ["inspect", "verify", "build"])
def test_built_in_bundles_have_names(command: str, name: str) -> None:
    result = run(command, name)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["inspect", "verify", "build"])
def test_an_unknown_built_in_bundle_is_named(command: str) -> None:
    result = run(command, "builtin:\x1b[31m")
    assert result.exit_code == 1 and "choose one of tim-tiny, tiny" in result.stderr and "\x1b" not in result.output


def test_a_missing_engine_is_not_the_bundles_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    result = run("verify", "builtin:tiny", "--engine", "openvino")
    assert result.exit_code == 1 and result.stdout == ""
    assert "openvino cannot be imported" in result.stderr and "pip install openvino" in result.stderr
    assert "do not use this bundle" not in result.stderr


def test_inspect_tells_seconds() -> None:
    result = run("inspect", "builtin:tiny")
    assert " on this machine, without loading" in result.stdout
    document = json.loads(run("inspect", "builtin:tiny", "--json").stdout)
    assert 0 < document["run"]["seconds"] < 1000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "about 0.04 s"), (12.3, "about 12 s"), (99.9, "about 100 s"), (601, "about 10 min"), (9000, "about 2.5 h")],
)
def test_durations_are_said_in_two_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_the_machine_is_measured_once_and_runs_correct_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMD_CACHE", str(tmp_path / "cache"))
    bundle, measured = Bundle.open(BUILT_IN), []

    def measure(threads: int | None) -> float:
        measured.append(threads)
        return 1e11

    monkeypatch.setattr(speed, "_measure", measure)
    share = speed.SHARE * 1e11

    def speed_of(flops: float, engine: str = "auto cpu") -> float:
        return flops / speed.seconds_of(flops, bundle, engine, 2)

    assert speed_of(1e9) == speed_of(1e9) == pytest.approx(share)
    assert measured == [2], "kept"
    speed.learn(1e9, 0.2, bundle, "auto cpu", 2)
    assert speed_of(1e9) == speed_of(1e8) == pytest.approx(5e9)
    assert speed_of(1e9, "openvino cpu") == pytest.approx(share)
    assert speed_of(1e13) == pytest.approx(share), "a small run says nothing of a large one"
    speed.learn(1e13, 50, bundle, "auto cpu", 2)
    assert [speed_of(flops) for flops in (1e9, 1e12, 1e13, 1e16)] == pytest.approx([5e9, 2e11, 2e11, 2e11])
    for damage in (b"", b"[1]", b'{"a": "b"}', b"\xff", b'{"matmul": NaN}', b"{" * 100000):
        (tmp_path / "cache" / "speed.json").write_bytes(damage)
        assert speed_of(1e9) == pytest.approx(share)
    monkeypatch.setenv("TMD_CACHE", "off")
    assert speed_of(1e9) > 0


def test_a_graph_that_is_compiled_anew_each_time_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    import tmd_runtime
    from tmd_engines.openvino import engine

    for limit in ("KEPT_BYTES", "REMARKED_BYTES"):
        monkeypatch.setattr(engine, limit, 10_000)
    with tmd_runtime.load(engine="openvino") as pipeline:
        first = pipeline("x", frames=1, size=(32, 32), seed=1)
        again = pipeline("x", frames=1, size=(32, 32), seed=1)
    assert any("compiles backbone anew in every process" in warning for warning in first.warnings)
    assert not any("anew" in warning for warning in again.warnings), "once is enough"


def test_compilation_counts_as_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    import tmd_runtime
    from tmd_engines.openvino.engine import OpenVinoEngine

    compile_graph = OpenVinoEngine._compile

    def slow(self: OpenVinoEngine, *arguments: Any) -> Any:
        time.sleep(0.3)
        return compile_graph(self, *arguments)

    monkeypatch.setattr(OpenVinoEngine, "_compile", slow)
    with tmd_runtime.load(engine="openvino") as pipeline:
        seconds = pipeline("x", frames=5, size=(32, 32), seed=1).stage_seconds
    assert seconds["load"] > 6 * 0.3, "text, backbone, flow head, update and both decoders"
    assert all(seconds[stage] < 0.3 for stage in ("text", "backbone", "flow_head", "decode"))
