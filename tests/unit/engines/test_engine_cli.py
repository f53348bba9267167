"""`tmd-engine` prints what is there, and ends with 1 for a failure and 2 for bad usage, never with a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.helpers.bundle_tools import edit_graph, edit_manifest, impossible_transpose
from tmd_engines.command import doctor
from tmd_engines.command.cli import main


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_inspect_prints_what_is_in_the_bundle(synthetic_bundle: Path) -> None:
    result = invoke("inspect", synthetic_bundle)
    assert result.exit_code == 0
    for expected in (
        "synthetic (wan2.1-t2v, tmd): 2 blocks",
        "2 steps (of 1/2/3/4)",
        "17 frames at 8 frames per second, 64x64 pixels",
        "backbone: fp32, opset 23",
        "max error 0.0e+00 and cosine 1.000000 against itself",
        "frames uint8[batch,4,8*height,8*width,3]",
        "tests/helpers/synthetic.py",
    ):
        assert expected in result.output


def test_inspect_json_is_the_manifest_and_what_a_run_needs(synthetic_bundle: Path) -> None:
    result = invoke("inspect", synthetic_bundle, "--json")
    document = json.loads(result.stdout)
    run, stages = document.pop("run"), document.pop("stages")
    assert document.pop("folder") == str(synthetic_bundle.resolve())
    assert document == json.loads((synthetic_bundle / "manifest.json").read_text())
    assert (run["width"], run["height"], run["frames"], run["steps"], run["inner_steps"]) == (64, 64, 17, 2, 2)
    assert run["peak_bytes"]["all"] > run["peak_bytes"]["low"] > 0
    assert run["flops"] == sum(stage["flops"] * stage["calls"] for stage in stages.values())
    assert list(stages) == ["text_encoder", "backbone", "flow_head", "update", "decoder"]
    assert stages["flow_head"]["calls"] == 4 and stages["flow_head"]["precision"] == "fp32"


def test_inspect_calculates_with_the_size_and_steps_asked_for(synthetic_bundle: Path) -> None:
    def stages(*arguments: str) -> dict[str, Any]:
        stages: dict[str, Any] = json.loads(invoke("inspect", synthetic_bundle, "--json", *arguments).stdout)["stages"]
        return stages

    small, large = stages("--size", "64x96"), stages("--size", "128x96", "--frames", "33", "--inner-steps", "4")
    assert large["decoder"]["flops"] == 2 * 33 / 17 * small["decoder"]["flops"]
    assert large["flow_head"]["calls"] == 8
    shown = invoke("inspect", synthetic_bundle, "--size", "128x96", "--steps", "3").output
    assert "17 frames of 128x96, 3 steps of 2 inner steps" in shown
    assert "one stage after the other" in shown and "decoder " in shown


@pytest.mark.parametrize(
    "wish", [("--size", "64"), ("--size", "65x64"), ("--frames", "16"), ("--frames", "0"), ("--steps", "0")]
)
def test_inspect_refuses_what_the_model_cannot_make(synthetic_bundle: Path, wish: tuple[str, str]) -> None:
    result = invoke("inspect", synthetic_bundle, *wish)
    assert result.exit_code == 2 and result.stdout == ""


def test_inspect_prints_a_bundle_whose_graphs_cannot_be_counted(synthetic_bundle: Path) -> None:
    edit_graph(synthetic_bundle, impossible_transpose)
    assert "backbone.onnx cannot be sized: node Transpose" in invoke("inspect", synthetic_bundle).output
    document = json.loads(invoke("inspect", synthetic_bundle, "--json").stdout)
    assert document["stages"] is None and "Transpose" in document["sizing_problem"] and document["graphs"]


def test_inspect_prints_a_bundle_that_lacks_parts(synthetic_bundle: Path) -> None:
    def edit(document: dict[str, Any]) -> None:
        document["text"]["tokenizer"] = None
        for name in ("text_encoder", "decoder_first"):
            del document["graphs"][name]
        document["graphs"]["backbone"]["accuracy"] = None
        document["provenance"]["source_sha256"] = {"weights.safetensors": "0" * 64}
        document["provenance"]["loras"] = [{"file": "fast.safetensors", "sha256": "1" * 64, "strength": -0.125}]

    edit_manifest(synthetic_bundle, edit)
    result = invoke("inspect", synthetic_bundle)
    assert result.exit_code == 0
    assert "no tokenizer" in result.output and "accuracy not measured" in result.output
    assert "weights.safetensors sha256 0000" in result.output
    assert "LoRA fast.safetensors at strength -0.125, sha256 1111" in result.output
    origin = json.loads(invoke("inspect", synthetic_bundle, "--json").stdout)["provenance"]
    assert [lora["strength"] for lora in origin["loras"]] == [-0.125]


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_broken_bundle_is_one_sentence_and_exit_code_1(synthetic_bundle: Path, as_json: list[str]) -> None:
    (synthetic_bundle / "backbone.onnx.data").unlink()
    result = invoke("inspect", synthetic_bundle, *as_json)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert "backbone.onnx.data is missing" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("inspect",), ("inspect", "a", "b"), ("inspect", "--colour"), ("build",), ("build", "a", "--size", "big")],
)
def test_bad_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_doctor_says_what_is_there() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0
    for expected in ("python ", "cpu ", "onnxruntime ", "openvino ", "tensorrt ", "tensorrt-rtx ", "nvidia "):
        assert expected in result.output


def test_doctor_json() -> None:
    document = json.loads(invoke("doctor", "--json").stdout)
    assert document["engines"]["onnxruntime"]["version"]
    assert document["cpu"]["cores"] >= 1


def test_doctor_names_missing_and_broken_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(name: str) -> Any:
        if name == "openvino":
            raise ModuleNotFoundError("No module named 'openvino'", name="openvino")
        if name == "tensorrt":
            raise OSError("libnvinfer.so.11: cannot open shared object file\nmore")
        return SimpleNamespace(__version__="1.2.3")

    monkeypatch.setattr(doctor, "import_module", importing)
    output = invoke("doctor").output
    assert "onnxruntime  1.2.3" in output
    assert "not installed: pip install openvino" in output
    assert "installed, but cannot be imported: libnvinfer.so.11: cannot open shared object file more" in output


def test_doctor_reads_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "580.65.06, NVIDIA H200, 9.0\n580.65.06, NVIDIA RTX A1, Mobile, 8.6\n"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout=answer))
    output = invoke("doctor").output
    assert "driver 580.65.06: NVIDIA H200 (compute capability 9.0); NVIDIA RTX A1, Mobile (compute" in output


def test_inspect_tells_the_memory_of_the_engine_that_is_asked_for(synthetic_bundle: Path) -> None:
    names = ("onnxruntime", "tensorrt-rtx")
    told = {name: invoke("inspect", synthetic_bundle, "--engine", name).output for name in names}
    assert "GPU memory" in told["tensorrt-rtx"] and "by tensorrt-rtx (predicted)" in told["tensorrt-rtx"]
    assert "GPU memory" not in told["onnxruntime"] and "memory     " in told["onnxruntime"]
    assert invoke("inspect", synthetic_bundle, "--engine", "abacus").exit_code == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("570.10.01, NVIDIA GeForce RTX 4090, 8.9", "but driver 570.10.01 is too old: install 580 or newer"),
        ("580.65.06, NVIDIA GeForce RTX 2080, 7.5", "RTX 2080 has compute capability 7.5, for which our graphs cannot"),
        ("580.65.06, NVIDIA H200, 9.0", "which NVIDIA does not list for TensorRT for RTX: --engine tensorrt"),
        ("580.65.06, NVIDIA GeForce RTX 4090, 8.9", "1.7.1"),
    ],
)
def test_doctor_says_what_a_card_lacks_for_tensorrt_for_rtx(
    monkeypatch: pytest.MonkeyPatch, answer: str, said: str
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout=answer + "\n"))
    monkeypatch.setattr(doctor, "import_module", lambda name: SimpleNamespace(__version__="1.7.1"))
    monkeypatch.setattr("tmd_engines.tensorrt.engine.has_gpu", lambda: True)
    monkeypatch.setattr("tmd_engines.tensorrt.engine.has_cuda_bindings", lambda: True)
    (line,) = (line for line in invoke("doctor").output.splitlines() if line.startswith("  tensorrt-rtx"))
    assert said in line and ("but" in line) == (said != "1.7.1")


def test_doctor_survives_a_hanging_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    def hanging(*args: Any, **kwargs: Any) -> None:
        assert kwargs["timeout"] <= 10
        raise subprocess.TimeoutExpired("nvidia-smi", 10)

    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", hanging)
    assert invoke("doctor").exit_code == 0


def test_help_and_import_bring_no_heavy_library() -> None:
    code = (
        "import sys, tmd_engines, tmd_engines.command.cli\n"
        "try: tmd_engines.command.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'pydantic', 'torch', 'openvino', 'tensorrt', 'av', 'rich'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("LOADED []\n")


def test_opening_and_loading_bring_no_torch(synthetic_bundle: Path) -> None:
    code = (
        "import sys\n"
        "from tmd_engines import Bundle, load\n"
        "load(Bundle.open(sys.argv[1]), 'backbone', threads=1)\n"
        "print('torch' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(synthetic_bundle)], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
