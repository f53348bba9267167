"""Embeddings and latents as files: what is written is read, and what does not fit is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.numpy import save_file

import tmd_runtime
from tests.helpers.synthetic import TEXT_DIM, TEXT_LENGTH, velocity_sampler, write_synthetic_bundle
from tmd_engines import Bundle, Manifest
from tmd_engines.bundle.manifest import parse_manifest
from tmd_runtime import RuntimeFailure
from tmd_runtime.command.cli import command
from tmd_runtime.files.tensor_files import (
    Embeddings,
    Latents,
    encoder_sha256,
    load_embeds,
    load_latents,
    save_embeds,
    save_latents,
)

PROMPT = "a red circle moving right"
DECODER = ("decoder_first", "decoder_step")
DIT = ("backbone", "flow_head", "update")
GUIDED = velocity_sampler(guidance=4.0, negative_prompt="a blue square")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model cut in three ways, as it is carried to machines that do a part each, and a student."""
    folder = tmp_path_factory.mktemp("bundles")
    parts = {"full": ("text_encoder", *DIT, *DECODER), "lean": (*DIT, *DECODER), "dit": DIT, "text": ("text_encoder",)}
    made = {name: write_synthetic_bundle(folder / name, graphs, GUIDED) for name, graphs in parts.items()}
    return {**made, "student": write_synthetic_bundle(folder / "student")}


@pytest.fixture
def manifest(bundles: dict[str, Path]) -> Manifest:
    return Bundle.open(bundles["full"]).manifest


def some_embeds(negative: bool = True) -> Embeddings:
    rows = np.random.default_rng(0).normal(size=(2, 1, TEXT_LENGTH, TEXT_DIM)).astype(np.float32)
    return Embeddings(PROMPT, rows[0], "a blue square", rows[1] if negative else None)


def some_latents() -> Latents:
    values = np.random.default_rng(0).normal(size=(1, 16, 2, 4, 6)).astype(np.float32)
    return Latents(values, "synthetic", PROMPT, 2**63, 3, 1, 6.0, "unipc", 4.5, (48, 32))


def same(one: Any, other: Any) -> bool:
    """Whether two dataclasses are equal, arrays bit by bit."""
    pairs = ((getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


@pytest.mark.parametrize("negative", [True, False])
def test_embeddings_survive_a_round_trip(manifest: Manifest, tmp_path: Path, negative: bool) -> None:
    embeds = some_embeds(negative)
    save_embeds(tmp_path / "e.safetensors", embeds, manifest)
    found = load_embeds(tmp_path / "e.safetensors", manifest)
    assert same(found, embeds if negative else dataclasses.replace(embeds, negative_prompt=""))
    with safe_open(tmp_path / "e.safetensors", "np") as file:
        assert file.get_slice("prompt_embeds").get_shape() == [TEXT_LENGTH, TEXT_DIM]
        assert file.metadata()["encoder"] == encoder_sha256(manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]


def test_latents_survive_a_round_trip(manifest: Manifest, tmp_path: Path) -> None:
    save_latents(tmp_path / "l.safetensors", some_latents())
    assert same(load_latents(tmp_path / "l.safetensors", manifest), some_latents())


def test_short_embeddings_are_filled_with_zero_rows(manifest: Manifest, tmp_path: Path) -> None:
    """The transformer reads the zero rows after the prompt as well: their number is part of the prompt."""
    rows = np.ones((3, TEXT_DIM), np.float16)
    metadata = {"format": "tmd-embeds-1", "encoder": encoder_sha256(manifest) or ""}
    save_file({"prompt_embeds": rows}, tmp_path / "e", metadata)
    found = load_embeds(tmp_path / "e", manifest).prompt_embeds
    assert found.shape == (1, TEXT_LENGTH, TEXT_DIM) and found.dtype == np.float32
    assert found[0, :3].min() == 1 and not found[0, 3:].any()


def test_encoders_differ_in_each_of_their_files(bundles: dict[str, Path], tmp_path: Path, manifest: Manifest) -> None:
    def changed(file: str) -> str | None:
        document = manifest.model_dump(mode="json")
        document["files"][file]["sha256"] = "0" * 64
        return encoder_sha256(parse_manifest(json.dumps(document).encode(), "manifest"))

    own = encoder_sha256(manifest)

    def with_table(sha256: str) -> str | None:
        document = manifest.model_dump(mode="json")
        table = {"name": "token_embeds", "dtype": "float32", "shape": ["batch", "text", 1]}
        document["graphs"]["text_encoder"]["inputs"][0] = table
        document["text"]["embedding"] = {"file": "table.bin", "dtype": "float16", "rows": 64, "dim": 1}
        document["files"]["table.bin"] = {"size": 128, "sha256": sha256}
        return encoder_sha256(parse_manifest(json.dumps(document).encode(), "manifest"))

    assert len({own, changed("text_encoder.onnx"), changed("text_encoder.onnx.data")}) == 3
    assert len({own, with_table("0" * 64), with_table("1" * 64)}) == 3
    assert changed("backbone.onnx") == own
    assert encoder_sha256(Bundle.open(bundles["lean"]).manifest) is None
    assert encoder_sha256(Bundle.open(bundles["text"]).manifest) == own


def embeds_file(path: Path, **changes: Any) -> None:
    tensors = {"prompt_embeds": np.ones((TEXT_LENGTH, TEXT_DIM), np.float32)} | changes.pop("tensors", {})
    save_file(tensors, path, {"format": "tmd-embeds-1", "prompt": PROMPT} | changes)


def latents_file(path: Path, **changes: Any) -> None:
    shape = changes.pop("shape", (16, 2, 4, 6))
    metadata = {name: str(value) for name, value in dataclasses.asdict(some_latents()).items() if name != "latents"}
    metadata |= {"format": "tmd-latents-1", "width": "48", "height": "32"} | changes
    save_file({"latents": np.zeros(shape, np.float32)}, path, {k: v for k, v in metadata.items() if v is not None})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": "0" * 64}, "made by another text encoder (sha256 000000000000...)"),
        ({}, "made by another text encoder"),
        ({"format": "tmd-latents-1"}, "another kind: name an embeddings file"),
    ],
)
def test_foreign_embeddings_are_refused(manifest: Manifest, tmp_path: Path, changes: Any, said: str) -> None:
    embeds_file(tmp_path / "e", **changes)
    with pytest.raises(RuntimeFailure) as caught:
        load_embeds(tmp_path / "e", manifest)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"prompt_embeds": np.ones((4, TEXT_DIM + 1), np.float32)}, "belongs to another model"),
        ({"prompt_embeds": np.ones((TEXT_LENGTH + 1, TEXT_DIM), np.float32)}, "reads at most [32, 64]"),
        ({"prompt_embeds": np.ones((1, 4, TEXT_DIM), np.float32)}, "shape [1, 4, 64]"),
        ({"negative_embeds": np.ones((4, 2), np.float32)}, "negative_embeds of shape [4, 2]"),
        ({"prompt_embeds": np.full((4, TEXT_DIM), np.nan, np.float32)}, "NaN or Inf in prompt_embeds"),
        ({"prompt_embeds": np.ones((4, TEXT_DIM), np.int64)}, "numbers of the type I64"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    bundles: dict[str, Path], tmp_path: Path, tensors: Any, said: str
) -> None:
    """Also where the bundle has no encoder to compare with."""
    embeds_file(tmp_path / "e", tensors=tensors)
    with pytest.raises(RuntimeFailure) as caught:
        load_embeds(tmp_path / "e", Bundle.open(bundles["lean"]).manifest)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": (4, 2, 4, 6)}, "shape [4, 2, 4, 6], and this bundle decodes [16, frames"),
        ({"shape": (1, 16, 2, 4, 6)}, "shape [1, 16, 2, 4, 6]"),
        ({"shape": (16, 2, 4, 4)}, "decodes to 32x32 pixels, and they were made for 48x32"),
        ({"width": "fifty"}, "does not say how it was made: width is 'fifty'"),
        ({"seed": None}, "does not say how it was made: seed is missing"),
        ({"format": "tmd-embeds-1"}, "another kind: name a latents file"),
    ],
)
def test_latents_that_do_not_fit_are_refused(manifest: Manifest, tmp_path: Path, changes: Any, said: str) -> None:
    latents_file(tmp_path / "l", **changes)
    with pytest.raises(RuntimeFailure) as caught:
        load_latents(tmp_path / "l", manifest)
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 100])
def test_broken_files_are_one_sentence(manifest: Manifest, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    for load in (load_embeds, load_latents):
        with pytest.raises(RuntimeFailure, match="cannot be read as"):
            load(tmp_path / "f", manifest)
        with pytest.raises(RuntimeFailure, match="does not exist"):
            load(tmp_path / "nowhere", manifest)
        with pytest.raises(RuntimeFailure, match="is no file"):
            load(tmp_path, manifest)


# --- on the command line ---


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def record(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_one_run_cut_in_three_gives_the_same_video(bundles: dict[str, Path], here: Path) -> None:
    """Text on one machine, denoising on a second, decoding on a third."""
    whole = record("--bundle", bundles["full"], "--prompt", PROMPT, "--seed", 5, "--out", "whole.png")
    text = record("--bundle", bundles["text"], "--prompt", PROMPT, "--save-embeds", "e.st")
    assert (text["out"], text["embeds"], text["latents"], text["frames"]) == (None, "e.st", None, 0)
    latents = record("--bundle", bundles["dit"], "--embeds", "e.st", "--seed", 5, "--save-latents", "l.st")
    assert (latents["out"], latents["latents"], latents["prompt"]) == (None, "l.st", PROMPT)
    for engine in ("full", "student"):  # any bundle with the same latents decodes them
        decoded = record("--bundle", bundles[engine], "--latents", "l.st", "--out", f"{engine}.png")
        told = ("seed", "prompt", "steps", "nfe", "rule", "guidance", "frames", "width", "height")
        assert [decoded[key] for key in told] == [whole[key] for key in told]
    assert decoded["stage_seconds"]["backbone"] == 0 < decoded["stage_seconds"]["decode"]
    assert (whole["rule"], whole["guidance"], whole["nfe"], whole["memory"]) == ("unipc", 4.0, 6.0, "all")
    assert Path("full.png").read_bytes() == Path("student.png").read_bytes() == Path("whole.png").read_bytes()
    assert sorted(path.name for path in here.iterdir()) == ["e.st", "full.png", "l.st", "student.png", "whole.png"]


def test_files_beside_a_whole_run_are_numbered_as_it_is(bundles: dict[str, Path], here: Path) -> None:
    options = ("--bundle", bundles["full"], "--frames", 1, "--out", "v.png", "--save-embeds", "e.st")
    result = run("--prompt", "one", "--prompt", "two", *options, "--save-latents", "l.st", "--memory", "low")
    assert result.exit_code == 0
    names = {
        f"{name}-00{number}{end}" for number in (1, 2) for name, end in (("v", ".png"), ("e", ".st"), ("l", ".st"))
    }
    assert {path.name for path in here.iterdir()} == names
    assert "e-002.st: embeds of this run" in result.stdout and "guidance 4, NFE 6.00" in result.stdout
    assert load_embeds("e-002.st", Bundle.open(bundles["full"]).manifest).prompt == "two"


def test_latents_are_saved_before_decoding_begins(
    bundles: dict[str, Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("tmd_runtime.autoencoder.frames.ChunkDecoder", fail)
    result = run("--bundle", bundles["full"], "--prompt", PROMPT, "--save-latents", "l.st", "--out", "v.mp4")
    assert result.exit_code == 1 and "not enough memory" in result.stderr
    assert [path.name for path in here.iterdir()] == ["l.st"]


def test_a_single_frame_is_a_picture(bundles: dict[str, Path], here: Path) -> None:
    import av

    record("--bundle", bundles["full"], "--prompt", PROMPT, "--seed", 1, "--frames", 1, "--out", "still.png")
    with av.open("still.png") as file:
        picture = next(file.decode(video=0)).to_ndarray(format="rgb24")
    expected = tmd_runtime.load(bundles["full"])(PROMPT, seed=1, frames=1).frames
    assert np.array_equal(picture, expected[0])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--embeds", "e.st", "--prompt", "x"], 2, "--prompt or --prompt-file and --embeds are two beginnings"),
        (["--embeds", "e.st", "--latents", "l.st"], 2, "--embeds and --latents are two beginnings"),
        (["--embeds", "e.st", "--save-embeds", "f.st"], 2, "leave --save-embeds out"),
        (["--latents", "l.st", "--steps", "2"], 2, "leave --steps out"),
        (["--latents", "l.st", "--negative-prompt", "x"], 2, "leave --negative-prompt out"),
        (["--latents", "l.st", "--save-latents", "x"], 2, "leave --save-latents out"),
        (["--latents", "nowhere.st"], 1, "nowhere.st does not exist: name a latents file"),
        (["--embeds", "l.st"], 1, "another kind: name an embeddings file"),
        (["--embeds", "plain.st"], 1, "no text encoder to make them: save the embeddings again"),
        (["--prompt", "x", "--save-embeds", "nowhere/e.st"], 1, "the folder nowhere does not exist"),
        (["--prompt", "x", "--save-latents", "."], 1, "taken by something that is no file"),
        (["--prompt", "x", "--guidance", "nan"], 2, "'nan' is no number"),
        (["--prompt", "x", "--guidance", "much"], 2, "'much' is no number"),
        (["--prompt", "x", "--shift", "0"], 2, "from 1 to 1000"),
        (["--prompt", "x", "--guidance", "1", "--negative-prompt", "y"], 2, "a negative prompt needs guidance"),
        (["--prompt", "x", "--memory", "some"], 2, "some"),
        (["--prompt", "x"], 1, "so it cannot read a prompt. Give it embeddings"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(
    bundles: dict[str, Path], here: Path, arguments: list[str], code: int, said: str
) -> None:
    manifest = Bundle.open(bundles["full"]).manifest
    save_embeds("e.st", some_embeds(), manifest)
    save_embeds("plain.st", some_embeds(negative=False), manifest)
    save_latents("l.st", some_latents())
    before = sorted(here.iterdir())
    result = run(*arguments, "--bundle", bundles["lean"])
    assert result.exit_code == code, result.output
    assert said in " ".join(result.stderr.split())
    assert result.stdout == "" and "Traceback" not in result.output
    assert sorted(here.iterdir()) == before


def test_the_file_brings_its_own_negative_prompt_unless_one_is_named(bundles: dict[str, Path], here: Path) -> None:
    save_embeds("e.st", some_embeds(), Bundle.open(bundles["full"]).manifest)
    for name, options in (
        ("file", ()),
        ("other", ("--negative-prompt", "an orange star")),
        ("none", ("--guidance", 1)),
    ):
        record("--bundle", bundles["full"], "--embeds", "e.st", "--seed", 1, "--out", f"{name}.png", *options)
    pictures = {path.read_bytes() for path in here.glob("*.png")}
    assert len(pictures) == 3


def test_another_encoder_is_noticed_by_the_command(bundles: dict[str, Path], here: Path) -> None:
    save_embeds("own.st", some_embeds(), Bundle.open(bundles["student"]).manifest)  # the same encoder
    embeds_file(Path("other.st"), encoder="0" * 64)
    for name, code in (("own", 0), ("other", 1)):
        result = run("--bundle", bundles["full"], "--embeds", f"{name}.st", "--out", "v.png")
        assert result.exit_code == code, result.output
    assert "made by another text encoder" in result.stderr


def test_latents_of_a_video_are_not_for_a_model_of_stills(tmp_path: Path) -> None:
    """tim-tiny has as many channels as the model of videos."""
    with tmd_runtime.load() as pipeline:
        settings = pipeline.settings(seed=1, frames=5, size=(32, 32))
        result = pipeline("x", seed=1, frames=5, size=(32, 32))
    assert result.latents is not None
    save_latents(tmp_path / "l", Latents.of(settings, result.latents, "m", "x"))
    out = str(tmp_path / "v.png")
    done = CliRunner().invoke(
        command, ["--latents", str(tmp_path / "l"), "--bundle", "builtin:tim-tiny", "--out", out, "--quiet"]
    )
    assert (
        done.exit_code == 1 and "holds the latents of a video, 2 in time, and this bundle decodes stills" in done.stderr
    )
