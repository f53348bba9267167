"""One seed is one video: file by file, number by number, whatever the host's language."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tmd_runtime
from tests.helpers.processes import PROGRAM
from tmd_engines.device.numbers import decimal_point
from tmd_runtime import UsageFailure

RANDOM = np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), np.uint8)


@pytest.mark.parametrize("ending", ["mp4", "webm", "gif", "png"])
def test_a_video_file_repeats_byte_for_byte(tmp_path: Path, ending: str) -> None:
    for name in ("a", "b"):
        tmd_runtime.write_video(tmp_path / f"{name}.{ending}", RANDOM, 8)
    assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_all_files_of_a_run_repeat_in_another_process(tmp_path: Path) -> None:
    names = ["v.webm", "l.latents", "e.embeds", "p.gif"]
    options = ["--prompt", "a red circle", "--seed", "3", "--frames", "5", "--size", "32x32", "--steps", "2", "--quiet"]
    files = ["--out", names[0], "--save-latents", names[1], "--save-embeds", names[2], "--preview", names[3]]
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": number}
        subprocess.run([*PROGRAM, *options, *files], cwd=tmp_path / number, env=environment, check=True, timeout=60)
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_our_safetensors_are_those_of_the_library(tmp_path: Path) -> None:
    from safetensors import safe_open

    from tmd_runtime.files.tensor_files import _safetensors

    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((1, 5), np.float32)}
    (tmp_path / "x").write_bytes(_safetensors(tensors, {"words": 'grün "und" \n \ud800'}))
    with safe_open(tmp_path / "x", "np") as file:
        assert file.metadata() == {"words": 'grün "und" \n ?'}
        for name, values in tensors.items():
            assert np.array_equal(file.get_tensor(name), values)


@pytest.mark.skipif(shutil.which("localedef") is None, reason="no localedef to make a language with a decimal comma")
def test_a_decimal_comma_changes_no_frame(tmp_path: Path) -> None:
    made = subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"], capture_output=True)
    if not (tmp_path / "de_DE.UTF-8").is_dir():
        pytest.skip(f"localedef cannot make de_DE here: {made.stderr.decode()[:200]}")
    script = (
        "import locale, sys, hashlib\n"
        "language = sys.argv[2]\n"
        "locale.setlocale(locale.LC_ALL, language)\n"
        "assert locale.localeconv()['decimal_point'] == (',' if language != 'C' else '.')\n"
        "import tmd_runtime\n"
        "result = tmd_runtime.load(engine=sys.argv[1])('a red circle', seed=1)\n"
        "print(hashlib.sha256(result.frames.tobytes()).hexdigest())\n"
        "assert locale.localeconv()['decimal_point'] == (',' if language != 'C' else '.')\n"
    )
    environment = {**os.environ, "LOCPATH": str(tmp_path), "TMD_CACHE": "off"}
    for engine in ("openvino", "onnxruntime"):
        found = {
            subprocess.run(
                [sys.executable, "-c", script, engine, language],
                env=environment, capture_output=True, text=True, check=True, timeout=120,
            ).stdout
            for language in ("C", "de_DE.UTF-8")
        }  # fmt: skip
        assert len(found) == 1, engine


def test_the_point_is_for_one_thread_and_a_while() -> None:
    with decimal_point(), decimal_point():
        assert float("0.5") == 0.5


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"seed": 2**32}, "reads 32 bits of a seed"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"seed": "1"}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"steps": 2.0}, "steps must be a whole number"),
        ({"frames": [1]}, "frames must be a whole number"),
        ({"size": 64}, "size must be two whole numbers"),
        ({"size": (64,)}, "size must be two whole numbers"),
        ({"size": "64x64"}, "size must be two whole numbers"),
        ({"size": (64.0, 64.0)}, "size must be two whole numbers"),
        ({"guidance": "7"}, "guidance must be a finite number"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"shift": float("inf")}, "shift must be a finite number"),
        ({"rho": None, "strength": 1j}, "strength must be a finite number"),
        ({"schedule": "1,0"}, "schedule must be a list of finite numbers"),
        ({"schedule": (1, float("nan"), 0)}, "schedule must be a list of finite numbers"),
        ({"negative_prompt": b"x"}, "negative_prompt must be a text"),
        ({"colour": "red"}, r"pipeline\(\) and pipeline\.settings\(\) have no argument 'colour': a run has seed"),
        ({"callback": 3}, "a callback must be a function, not int"),
        ({"on_frames": "x"}, "a callback must be a function"),
        ({"prompt_embeds": [1]}, "prompt_embeds must be a numpy array of numbers, not list"),
        ({"init_latents": "x"}, "init_latents must be a numpy array"),
        ({"image": "cat.png"}, "a picture must be a numpy array"),
    ],
)
def test_a_wrong_type_gets_a_sentence(wishes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageFailure, match=message):
        tmd_runtime.load()("a red circle", **wishes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tmd_runtime.load(3), "a bundle is a folder or builtin:NAME, not a int"),  # type: ignore[arg-type]
        (lambda: tmd_runtime.load(threads="2"), "threads is '2'"),  # type: ignore[arg-type]
        (lambda: tmd_runtime.load(threads=True), "threads is True"),
        (lambda: tmd_runtime.load(plans=4), "plans is 4: give a folder"),  # type: ignore[arg-type]
        (lambda: tmd_runtime.load()(None), "a prompt must be a text, not NoneType"),  # type: ignore[arg-type]
        (lambda: tmd_runtime.load()(b"x"), "a prompt must be a text, not bytes"),  # type: ignore[arg-type]
        (lambda: tmd_runtime.load().encode(7), "a prompt must be a text"),  # type: ignore[arg-type]
        (lambda: tmd_runtime.load().decode([1]), "latents must be a numpy array"),  # type: ignore[arg-type]
        (lambda: tmd_runtime.load().decode(np.array(["x"])), "latents must be a numpy array of numbers"),
    ],
)
def test_so_does_one_of_other_calls(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageFailure, match=message):
        call()


def test_json_never_holds_what_json_has_not(tmp_path: Path) -> None:
    options = ["--prompt", "x", "--frames", "1", "--size", "32x32", "--out", str(tmp_path / "v.png"), "--json"]
    done = subprocess.run([*PROGRAM, *options], capture_output=True, text=True, check=True, timeout=60)

    def never(name: str) -> None:
        raise AssertionError(name)

    record = json.loads(done.stdout, parse_constant=never)
    assert record["threads"] == 2 and record["estimated_seconds"] > 0
