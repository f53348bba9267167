"""Runs of Transition Models: deadlines, previews, pictures to start from, classes, and what a PNG says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import tmd_runtime
from tests.helpers.results import result_latents
from tests.helpers.synthetic import velocity_sampler, write_synthetic_bundle
from tests.helpers.synthetic_tim import CLASSES, write_tim_bundle
from tmd_runtime import NoiseStream, Pipeline, RuntimeFailure, UsageFailure
from tmd_runtime.command.cli import command
from tmd_runtime.files.tensor_files import Latents, save_latents

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "text": write_tim_bundle(folder / "text"),
        "guided": write_tim_bundle(folder / "guided", guidance=3.0),
        "classes": write_tim_bundle(folder / "classes", classes=True, guidance=2.0),
        "tmd": write_synthetic_bundle(folder / "tmd"),
        **{
            rule: write_synthetic_bundle(folder / rule, sampler=velocity_sampler(rule=rule, guidance=guidance))
            for rule, guidance in (("euler", 1.0), ("renoise", 1.0), ("unipc", 4.0))
        },
    }


@pytest.fixture(scope="module")
def pipelines(folders: dict[str, Path]) -> dict[str, Pipeline]:
    return {name: tmd_runtime.load(folder, threads=1) for name, folder in folders.items()}


# Deadlines (which steps they take: test_tim_deadline.py)


def test_a_deadline_says_what_it_came_to(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["guided"]
    short = pipeline(PROMPT, seed=3, deadline=1e-9)
    assert (short.steps, short.nfe, short.times) == (1, 1, (1.0, 0.0))
    assert np.array_equal(result_latents(short), result_latents(pipeline(PROMPT, seed=3, steps=1)))
    long = pipeline(PROMPT, seed=3, deadline=60.0, steps=5)
    assert (long.steps, long.nfe) == (5, 9)  # the first step is not guided
    np.testing.assert_allclose(result_latents(long), result_latents(pipeline(PROMPT, seed=3, steps=5)), atol=1e-5)
    again = pipeline(PROMPT, seed=3, schedule=long.times)
    assert np.array_equal(again.frames, long.frames), "its times make the picture again"


# Previews


@pytest.mark.parametrize("name", ["text", "guided", "classes", "tmd", "euler", "renoise", "unipc"])
def test_a_preview_is_what_the_run_would_give_if_its_step_were_the_last(
    pipelines: dict[str, Pipeline], name: str
) -> None:
    pipeline = pipelines[name]
    prompt = "" if name == "classes" else PROMPT
    wishes: dict[str, Any] = {"label": 2} if name == "classes" else {}
    wishes |= {"seed": 5, "steps": 3}
    plain = pipeline(prompt, **wishes)
    seen: list[np.ndarray] = []
    shown = pipeline(prompt, **wishes, on_preview=seen.append)
    assert np.array_equal(result_latents(plain), result_latents(shown)) and np.array_equal(plain.frames, shown.frames)
    assert len(seen) == 2 and all(each.shape == plain.frames.shape for each in seen)
    if pipeline.manifest.model.family == "tim":
        expected = [pipeline(prompt, label=wishes.get("label"), seed=5, schedule=jumps).frames
                    for jumps in ((1.0, 0.0), (1.0, plain.times[1], 0.0))]  # fmt: skip
    elif name == "tmd":
        expected = [pipeline(prompt, seed=5, steps=1).frames]
    else:
        bundle = pipeline.bundle
        times = pipeline.settings(**wishes).times
        expected = []
        for count in (1, 2):
            # The same steps with the end cut off: fixed times, and the last of them goes to 0.
            changes = {"times": times[:count], "allowed_steps": (count,), "steps": count}
            sampler = bundle.manifest.sampler.model_copy(update=changes)
            manifest = bundle.manifest.model_copy(update={"sampler": sampler})
            expected.append(Pipeline(type(bundle)(bundle.folder, manifest), threads=1)(prompt, seed=5).frames)
    for found, wanted in zip(seen, expected, strict=False):
        # A level: the estimate is rounded in another order than the step.
        assert np.abs(found.astype(int) - wanted).max() <= 1
        assert np.abs(found.astype(int) - plain.frames).max() > 3


def test_previews_need_time_and_room(folders: dict[str, Path], pipelines: dict[str, Pipeline]) -> None:
    with pytest.raises(UsageFailure, match="previews take time that a deadline cannot plan with"):
        pipelines["text"](PROMPT, deadline=1.0, on_preview=print)
    with pytest.raises(RuntimeFailure, match="needs the decoder beside the model"):
        tmd_runtime.load(folders["text"], threads=1, memory="low")(PROMPT, on_preview=print)


# Pictures to start from


@pytest.mark.parametrize("schedule", [None, (0.5, 0.4, 0.0)])
def test_a_run_from_a_picture_begins_at_its_strength(
    pipelines: dict[str, Pipeline], schedule: tuple[float, ...] | None
) -> None:
    pipeline = pipelines["text"]
    picture = result_latents(pipeline(PROMPT, seed=1, size=(48, 32)))
    wishes: dict[str, Any] = {"steps": 2} if schedule is None else {"schedule": schedule}
    found = pipeline(PROMPT, seed=2, init_latents=picture, strength=0.5, **wishes)
    assert found.times == (schedule or (0.5, 0.25, 0.0)) and found.frames.shape == (1, 32, 48, 3)
    # The same from parts: noise mixed in by hand, as the time at which a run over the same times would stand.
    noise = NoiseStream(2).normal((1, 16, 1, 4, 6))
    loop: Any = pipeline._loop
    embeds = pipeline.encode(PROMPT)
    rows = loop[1]._rows[1]
    rows.read([embeds], 1.0)
    rows.x[...] = 0.5 * noise + 0.5 * picture
    for t, r in pairwise(found.times):
        rows.x[...] = rows.look(t, r)
    np.testing.assert_allclose(result_latents(found), rows.x, atol=1e-5)
    everything = pipeline(PROMPT, seed=2, init_latents=picture, strength=1.0)
    assert np.array_equal(result_latents(everything), result_latents(pipeline(PROMPT, seed=2, size=(48, 32))))
    alone = pipeline.denoise(embeds, seed=2, init_latents=picture, strength=0.5, **wishes)
    assert np.array_equal(alone, result_latents(found))


# What cannot be


@pytest.mark.parametrize(
    ("name", "wishes", "message"),
    [
        ("tmd", {"deadline": 1.0}, "a deadline is for Transition Models.*choose the number of steps"),
        ("euler", {"deadline": 1.0}, "a deadline is for Transition Models"),
        (
            "euler",
            {"strength": 0.5},
            "start from a picture is for Transition Models.*first frame.*Wan2.2-TI2V-5B. This model does neither",
        ),
        ("tmd", {"label": 1}, "no numbered classes: leave the class out"),
        ("text", {"label": 1}, "no numbered classes"),
        ("text", {"deadline": 0.0}, "a deadline of 0 s is out of range"),
        ("text", {"deadline": float("nan")}, "deadline must be a finite number, not nan"),
        ("text", {"strength": 0.0}, "a strength of 0 is out of range"),
        ("text", {"strength": 1.5}, "a strength of 1.5 is out of range"),
        ("text", {"strength": 0.5, "schedule": (1.0, 0.0)}, "must fall from 0.5 .the strength. to 0.*0.5,0.3,0.1,0"),
        ("text", {"steps": 2, "schedule": (1.0, 0.0), "deadline": 1.0}, "leave the steps out"),
        ("classes", {}, "choose a class, 0 to 4"),
        ("classes", {"label": CLASSES}, "there is no class 5: choose one from 0 to 4"),
        ("classes", {"label": 1, "negative_prompt": "x"}, "no negative prompt"),
        ("classes", {"label": 1, "frames": 5}, "makes stills"),
    ],
)
def test_impossible_wishes_say_what_is_possible(
    pipelines: dict[str, Pipeline], name: str, wishes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageFailure, match=message):
        pipelines[name].settings(**wishes)


def test_a_picture_and_a_strength_go_together(pipelines: dict[str, Pipeline]) -> None:
    picture = np.zeros((1, 16, 1, 4, 4), np.float32)
    for name, given, message in (
        ("text", {"strength": 0.5}, "there is none: give its latents"),
        ("text", {"init_latents": picture}, "choose a strength"),
        ("text", {"init_latents": picture, "strength": 0.5, "size": (64, 64)}, "leave the size out"),
        ("euler", {"init_latents": picture}, "is for Transition Models"),
    ):
        with pytest.raises(UsageFailure, match=message):
            pipelines[name](PROMPT, **given)


# Classes


def test_a_class_takes_the_place_of_the_prompt(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["classes"]
    one, two = pipeline(seed=1, label=1), pipeline(seed=1, label=2)
    assert (one.steps, one.nfe, one.prompt) == (4, 7, "") and not np.array_equal(one.frames, two.frames)
    assert np.array_equal(pipeline.denoise(None, seed=1, label=1), result_latents(one))
    # Guidance steers away from the number after the last class: with none of it left, the class alone.
    assert not np.array_equal(result_latents(pipeline(seed=1, label=1, guidance=1.0)), result_latents(one))
    for arguments, message in (((PROMPT,), "takes no prompt"), ((), "choose a class")):
        with pytest.raises(UsageFailure, match=message):
            pipeline(*arguments, label=1 if arguments else None)
    with pytest.raises(UsageFailure, match="needs the embeddings of a prompt"):
        pipelines["text"].denoise(None)


# On the command line


@pytest.fixture
def run(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: object) -> Result:
        words = ["--bundle", str(folders[name]), *map(str, arguments)]
        return CliRunner().invoke(command, words, catch_exceptions=False)

    return call


def texts(path: str) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        return dict(image.text)  # type: ignore[attr-defined]


def test_a_png_says_how_to_make_it_again(run: Callable[..., Result]) -> None:
    prompt = "ein grüner Kreis, 一只猫\nand a line"
    done = run("guided", "--prompt", prompt, "--seed", 3, "--deadline", 30, "--steps", 4, "--out", "a.png", "--json")
    document = json.loads(done.stdout)
    said = texts("a.png")
    assert said == {
        "model": "synthetic", "prompt": prompt, "seed": "3", "steps": "4", "guidance": "3",
        "schedule": ",".join(map(repr, document["times"])),
    }  # fmt: skip
    assert (document["steps"], document["nfe"]) == (4, 7)
    run("guided", "--prompt", said["prompt"], "--seed", 3, "--schedule", said["schedule"], "--out", "b.png")
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "wishes"),
    [
        ("guided", ("--prompt", "x", "--schedule", "1,0.6,0.2,0", "--rho", 0.5)),
        ("guided", ("--prompt", "x", "--deadline", 30, "--steps", 3)),
        ("classes", ("--class", 3, "--steps", 2)),
    ],
)
def test_a_png_of_saved_latents_says_the_same(
    run: Callable[..., Result], name: str, wishes: tuple[object, ...]
) -> None:
    run(name, *wishes, "--seed", 2, "--save-latents", "l.safetensors", "--out", "a.png")
    run(name, "--latents", "l.safetensors", "--out", "again.png")
    assert texts("again.png") == texts("a.png") and {"schedule", "class"} & set(texts("a.png"))
    assert Path("again.png").read_bytes() == Path("a.png").read_bytes()


def test_every_png_of_a_video_says_it_too(run: Callable[..., Result]) -> None:
    wishes = ("--prompt", "x", "--seed", 1, "--save-latents", "l.safetensors")
    said = {"model": "synthetic", "prompt": "x", "seed": "1", "steps": "2", "inner_steps": "2"}
    run("tmd", *wishes, "--out", "frames", "--frames", 5)
    assert [texts(f"frames/frame_{k:04}.png") for k in range(5)] == [said] * 5
    run("tmd", *wishes, "--out", "still.png", "--frames", 1)
    assert texts("still.png") == said
    run("tmd", "--latents", "l.safetensors", "--out", "again.png")
    assert texts("again.png") == said


def test_the_command_line_carries_classes_pictures_and_previews(run: Callable[..., Result]) -> None:
    done = run("classes", "--class", 3, "--seed", 1, "--save-latents", "l.safetensors", "--preview", "p.png")
    assert done.exit_code == 0, done.output
    assert Path("class-3-1.png").is_file() and texts("class-3-1.png")["class"] == "3"
    assert "p.png: preview of this run" in done.stdout and Image.open("p.png").size == (64, 64)
    assert run("classes", "--latents", "l.safetensors", "--out", "d.png").exit_code == 0
    assert np.array_equal(np.asarray(Image.open("d.png")), np.asarray(Image.open("class-3-1.png")))
    start = ("--init-latents", "l.safetensors", "--strength", 0.4, "--seed", 2, "--steps", 2, "--json")
    document = json.loads(run("classes", "--class", 0, *start, "--out", "i.png", "--preview", "q.png").stdout)
    assert document["times"] == [0.4, 0.2, 0.0] and document["preview"] == "q.png"
    assert texts("i.png")["strength"] == "0.4"
    single = json.loads(run("text", "--prompt", "x", "--steps", 1, "--preview", "r.png", "--json").stdout)
    assert single["preview"] is None and not Path("r.png").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "code", "message"),
    [
        ("tmd", ("--prompt", "x", "--deadline", 1), 2, "a deadline is for Transition Models"),
        ("text", ("--prompt", "x", "--deadline", -1), 2, "out of range"),
        ("text", ("--prompt", "x", "--deadline", 1, "--preview", "p.png"), 2, "previews take time"),
        ("text", ("--prompt", "x", "--preview", "p.jpg"), 2, "the ending '.jpg' is unknown"),
        ("text", ("--prompt", "x", "--strength", 0.5), 2, "give --image or --init-latents as well"),
        ("text", ("--prompt", "x", "--init-latents", "no.safetensors", "--strength", 0.5), 1, "does not exist"),
        (
            "text",
            ("--prompt", "x", "--init-latents", "clip.safetensors", "--strength", 0.5),
            1,
            "holds the latents of a video",
        ),
        ("classes", ("--prompt", "x"), 2, "choose a class, 0 to 4"),
        ("classes", ("--prompt", "x", "--class", 1), 2, "two beginnings of a run"),
        ("classes", ("--class", 9), 2, "there is no class 9"),
        ("classes", ("--class", 1, "--save-embeds", "e.safetensors"), 2, "a class has no embeddings"),
        ("text", ("--latents", "clip.safetensors", "--preview", "p.png"), 2, "leave --preview out"),
    ],
)
def test_mistakes_are_one_message(
    run: Callable[..., Result], name: str, arguments: tuple[Any, ...], code: int, message: str
) -> None:
    clip = np.zeros((1, 16, 2, 4, 4), np.float32)
    save_latents("clip.safetensors", Latents(clip, "m", "p", 0, 1, 1, 1.0, "euler", 1.0, (32, 32)))
    result = run(name, *arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert message in " ".join(result.stderr.split())
    assert sorted(path.name for path in Path().iterdir()) == ["clip.safetensors"]
