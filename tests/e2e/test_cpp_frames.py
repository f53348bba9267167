"""The C++ example program makes the frames of `tmd-run`, bit for bit: same bundle, engine, threads and seed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tmd_runtime
from tests.helpers.cpp_tools import engine_options, in_cpp, program
from tests.helpers.synthetic import GRAPHS, SECOND, take_wan22_latents, velocity_sampler, write_synthetic_bundle
from tests.helpers.synthetic_quantized import QUANTIZED, write_quantized_bundle
from tmd_runtime.built_in import BUILT_IN
from tmd_runtime.errors import UsageFailure

ENGINES = ("openvino", "onnxruntime")


@pytest.fixture(scope="module", params=ENGINES)
def pipeline(request: pytest.FixtureRequest) -> Iterator[tuple[str, tmd_runtime.Pipeline]]:
    """An engine, and a pipeline on it."""
    engine_options(request.param)
    with tmd_runtime.load(engine=request.param, threads=1) as loaded:
        yield request.param, loaded


@pytest.mark.parametrize(
    ("prompt", "seed", "steps", "inner_steps", "frames", "size"),
    [
        ("a red circle moving right on a black background", 1, None, None, None, None),
        ("a “blue” square &amp; a circle, moving up", 7, 1, 1, None, None),
        ("Ein grüner Würfel ﬁndet seinen Weg", 2**32 - 1, 2, 4, 1, None),
        ("一个红色的圆", 0, None, 1, 9, (96, 64)),
    ],
)
def test_frames_are_bit_equal(
    pipeline: tuple[str, tmd_runtime.Pipeline],
    tmp_path: Path,
    prompt: str,
    seed: int,
    steps: int | None,
    inner_steps: int | None,
    frames: int | None,
    size: tuple[int, int] | None,
) -> None:
    wanted = {"--seed": seed, "--steps": steps, "--inner-steps": inner_steps, "--frames": frames}
    options = [word for name, value in wanted.items() if value is not None for word in (name, value)]
    if size is not None:
        options += ["--size", f"{size[0]}x{size[1]}"]
    engine, in_python = pipeline
    expected = in_python(prompt, seed=seed, steps=steps, inner_steps=inner_steps, frames=frames, size=size).frames
    assert expected.std() > 1, "a picture, not a flat colour"
    np.testing.assert_array_equal(
        in_cpp(tmp_path / "v.rgb", prompt, engine, *options).reshape(expected.shape), expected
    )


WAN_SAMPLERS = {
    "unipc": velocity_sampler(rule="unipc", steps=6, guidance=5.0, negative_prompt="a blue square"),
    "renoise": velocity_sampler(
        rule="renoise",
        steps=3,
        allowed_steps=[1, 2, 3],
        times=[0.9876, 0.85, 0.6],
        time_rounding="bfloat16",
        init_scale=0.9876,
    ),
    "euler": velocity_sampler(rule="euler", steps=2, allowed_steps=[2], times=[1.0, 0.8333], time_rounding="integer"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("rule", "guidance"), [("unipc", None), ("unipc", 1.0), ("renoise", None), ("euler", 2.5)])
def test_models_without_inner_flow_are_bit_equal(
    tmp_path: Path, rule: str, guidance: float | None, engine: str
) -> None:
    bundle = write_synthetic_bundle(tmp_path / "bundle", sampler=WAN_SAMPLERS[rule])
    options = [] if guidance is None else ["--guidance", guidance]
    engine_options(engine)
    with tmd_runtime.load(bundle, engine=engine, threads=1) as pipeline:
        expected = pipeline("a red circle moving right", seed=5, guidance=guidance).frames
    assert expected.std() > 1
    found = in_cpp(tmp_path / "v.rgb", "a red circle moving right", engine, "--seed", 5, *options, bundle=bundle)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_latents_of_another_geometry_are_bit_equal(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_wan22_latents(monkeypatch)
    bundle = write_synthetic_bundle(tmp_path / "bundle", sampler=WAN_SAMPLERS["unipc"])
    engine_options(engine)
    with tmd_runtime.load(bundle, engine=engine, threads=1) as pipeline:
        result = pipeline("a red circle moving right", seed=5, frames=9, size=(96, 64))
        with pytest.raises(UsageFailure, match="a width of 80 pixels cannot be made: choose a multiple of 32"):
            pipeline("a red circle", size=(80, 64))
    assert result.latents is not None and result.latents.shape == (1, 48, 3, 4, 6)
    assert result.frames.shape == (9, 64, 96, 3)
    assert result.frames.std() > 1
    wishes = ("--seed", 5, "--frames", 9, "--size")
    found = in_cpp(tmp_path / "v.rgb", "a red circle moving right", engine, *wishes, "96x64", bundle=bundle)
    np.testing.assert_array_equal(found.reshape(result.frames.shape), result.frames)
    words = (program("tmd_generate"), bundle, "a red circle", tmp_path / "w.rgb", *wishes, "80x64")
    run = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "choose a multiple of 32" in run.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_a_video_that_begins_with_a_picture_is_bit_equal(tmp_path: Path, engine: str) -> None:
    bundle = write_synthetic_bundle(tmp_path / "bundle", ("encoder", *GRAPHS), WAN_SAMPLERS["unipc"], holds=True)
    picture = np.random.default_rng(1).integers(0, 256, (48, 80, 3), np.uint8)
    (tmp_path / "first.ppm").write_bytes(b"P6\n80 48\n255\n" + picture.tobytes())
    engine_options(engine)
    with tmd_runtime.load(bundle, engine=engine, threads=1) as pipeline:
        expected = pipeline("a red circle", seed=5, frames=9, size=(80, 48), image=picture).frames
    options = ("--seed", 5, "--frames", 9, "--size", "80x48", "--image", tmp_path / "first.ppm")
    found = in_cpp(tmp_path / "v.rgb", "a red circle", engine, *options, bundle=bundle)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    words = (program("tmd_generate"), bundle, "a red circle", tmp_path / "w.rgb", *options[:-3], "64x48", *options[-2:])
    run = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "is no picture of 64x48" in run.stderr and not (tmp_path / "w.rgb").exists()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("memory", ["all", "low"])
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_two_transformers_that_take_turns_are_bit_equal(
    tmp_path: Path, guidance: float, memory: str, engine: str
) -> None:
    """With guidance one of UniPC, whose history goes over; without one of Euler through fixed times."""
    second = {"guidance_2": 3.0, "negative_prompt": "a blue square"} if guidance != 1 else {}
    sampler = {**WAN_SAMPLERS["unipc" if second else "euler"], "guidance": guidance, "boundary": 0.875, **second}
    bundle = write_synthetic_bundle(tmp_path / "bundle", (*GRAPHS, *SECOND), sampler)
    engine_options(engine)
    with tmd_runtime.load(bundle, engine=engine, threads=1, memory=memory) as pipeline:
        expected = pipeline("a red circle moving right", seed=5).frames
    assert expected.std() > 1
    options = ("--seed", 5, "--memory", memory)
    found = in_cpp(tmp_path / "v.rgb", "a red circle moving right", engine, *options, bundle=bundle)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_two_commands_agree(tmp_path: Path, engine: str) -> None:
    """As a user types them, before any encoding: PNG frames of one, raw frames of the other."""
    import av

    engine_options(engine)
    prompt = "a green square moving left on a white background"
    tmd_run = [
        sys.executable,
        "-c",
        "import sys; from tmd_runtime.command.cli import main; sys.exit(main())",
        "--prompt",
        prompt,
    ]
    options = ["--engine", engine, "--threads", "1", "--seed", "3", "--out", str(tmp_path / "frames")]
    # As the console script does it, whether or not the package is installed.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([*tmd_run, *options], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    pictures = []
    for path in sorted((tmp_path / "frames").glob("frame_*.png")):
        with av.open(str(path)) as file:
            pictures.append(next(file.decode(video=0)).to_ndarray(format="rgb24"))
    expected = np.stack(pictures)
    np.testing.assert_array_equal(
        in_cpp(tmp_path / "v.rgb", prompt, engine, "--seed", 3).reshape(expected.shape), expected
    )


def test_bad_usage_ends_with_2_and_a_failed_run_with_1(tmp_path: Path) -> None:
    def ends_with(*words: object) -> tuple[int, str]:
        command = [str(word) for word in (program("tmd_generate"), *words)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return run.returncode, run.stderr

    assert ends_with()[0] == 2
    assert ends_with(BUILT_IN, "", tmp_path / "x.rgb")[0] == 2
    code, said = ends_with(tmp_path, "a prompt", tmp_path / "x.rgb")
    assert code == 1 and "manifest.json is missing" in said
    assert not (tmp_path / "x.rgb").exists()


def assert_bit_equal(bundle: Path, engine: str, out: Path) -> None:
    """One prompt of several steps, in Python and in C++."""
    engine_options(engine)
    with tmd_runtime.load(bundle, engine=engine, threads=1) as pipeline:
        expected = pipeline("a red circle moving right", seed=5).frames
    assert expected.std() > 1
    found = in_cpp(out, "a red circle moving right", engine, "--seed", 5, bundle=bundle)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", [("int8", "int8"), ("fp8", "fp8"), ("int8", "fp8")], ids="-".join)
def test_graphs_in_8_bits_are_bit_equal(tmp_path: Path, engine: str, precision: tuple[str, str]) -> None:
    bundle = write_quantized_bundle(tmp_path / "bundle", dict(zip(QUANTIZED, precision, strict=True)))
    assert_bit_equal(bundle, engine, tmp_path / "v.rgb")


def test_graphs_in_4_bits_are_bit_equal(tmp_path: Path) -> None:
    bundle = write_quantized_bundle(tmp_path / "bundle", dict.fromkeys(QUANTIZED, "nvfp4"))
    assert_bit_equal(bundle, "onnxruntime", tmp_path / "v.rgb")


def test_what_openvino_does_not_compute_is_said_in_one_sentence(tmp_path: Path) -> None:
    engine_options("openvino")
    bundle = write_quantized_bundle(tmp_path / "bundle", dict.fromkeys(QUANTIZED, "nvfp4"))
    words = (bundle, "a prompt", tmp_path / "v.rgb", "--engine", "openvino")
    command = [str(word) for word in (program("tmd_generate"), *words)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "is nvfp4, which the engine openvino does not compute: use onnxruntime" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp8", "nvfp4"])
def test_the_built_in_model_in_8_bits_is_bit_equal(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("torch", reason="tmd-export needs torch")
    from click.testing import CliRunner

    from tmd_export.cli import command

    (tmp_path / "prompts.txt").write_text("a red circle moving right on a black background\n", encoding="utf-8")
    words = ["--model", "tiny", "--precision", precision, "--calibration", tmp_path / "prompts.txt", "--no-verify"]
    exported = CliRunner().invoke(command, [str(word) for word in (*words, "--out", tmp_path / "bundle")])
    assert exported.exit_code == 0, exported.output
    for engine in ENGINES:
        if (engine, precision) != ("openvino", "nvfp4"):  # which it does not compute
            assert_bit_equal(tmp_path / "bundle", engine, tmp_path / f"{engine}.rgb")
