"""What models say they can do, what requests of them come to, and which of them stay loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from click.testing import CliRunner

from tests.helpers.serving import a_job
from tests.helpers.synthetic import GRAPHS, velocity_sampler, write_synthetic_bundle
from tests.helpers.synthetic_tim import write_tim_bundle
from tmd_runtime import RuntimeFailure, UsageFailure
from tmd_runtime.command.cli import command as tmd_run
from tmd_runtime.files.png import png
from tmd_serve.errors import Refusal
from tmd_serve.executor import Wanted
from tmd_serve.files import PICTURE, DataFolder
from tmd_serve.jobs import Job, Progress
from tmd_serve.local.embeds import Embedded, EmbedsCache
from tmd_serve.local.library import Library
from tmd_serve.local.meter import Meter
from tmd_serve.local.model import EngineOptions, Model
from tmd_serve.local.run import Runner
from tmd_serve.settings import Limits

RED = "a red circle moving right on a black background"


@pytest.fixture(scope="module")
def tiny() -> Model:
    return Model("tiny", "builtin:tiny", EngineOptions(), Limits())


@pytest.fixture(scope="module")
def stills() -> Model:
    return Model("stills", "builtin:tim-tiny", EngineOptions(), Limits())


def test_a_card_offers_what_the_family_grants_and_nothing_else(tiny: Model, stills: Model) -> None:
    video, image = tiny.card.options, stills.card.options
    assert (video["kind"], image["kind"]) == ("video", "image")
    assert (video["steps"]["allowed"], video["inner_steps"]) == ([1, 2, 3, 4], {"default": 2, "allowed": [1, 2, 4]})
    assert (image["steps"]["allowed"], image["inner_steps"]) == (None, None)
    for option in ("guidance", "strength"):
        assert (video[option], image[option] is None) == (None, False)
    for option in ("negative_prompt", "schedule", "deadline", "rho", "image"):
        assert (video[option], image[option]) == (False, True), option
    assert video["frames"] == {"default": 17, "multiple": 4, "plus": 1, "max": 161}
    assert (image["frames"]["max"], image["fps"], video["fps"]["default"]) == (1, None, 8)
    for model in (tiny, stills):
        for side in ("width", "height"):
            option = model.card.options[side]
            model.settings({"size": [option["multiple"]] * 2})
            assert option["max"] % option["multiple"] == 0


def test_every_example_is_a_prompt_that_the_model_takes(tiny: Model, stills: Model) -> None:
    for model in (tiny, stills):
        assert len(model.card.options["examples"]) >= 3
        for prompt in model.card.options["examples"]:
            model.plan(Wanted(prompt), None)


def test_a_plan_holds_its_seed_and_size_so_that_a_second_run_is_the_same(tiny: Model) -> None:
    plan = tiny.plan(Wanted(RED), None)
    assert plan.request["wishes"] == {"seed": plan.resolved["seed"], "size": [64, 64]}
    assert plan.resolved["seed"] != tiny.plan(Wanted(RED), None).resolved["seed"]
    again = tiny.settings(plan.request["wishes"])
    assert (again.seed, again.frames, again.steps) == (plan.resolved["seed"], 17, 2)


@pytest.mark.parametrize(("seconds", "fps", "frames"), [(2, None, 17), (4, None, 33), (0.01, None, 1), (1, 16, 17)])
def test_seconds_are_the_nearest_number_of_frames(tiny: Model, seconds: float, fps: int | None, frames: int) -> None:
    resolved = tiny.plan(Wanted(RED, {} if fps is None else {"fps": fps}, seconds=seconds), None).resolved
    assert (resolved["frames"], resolved["fps"]) == (frames, fps or 8)


@pytest.mark.parametrize(
    ("wishes", "error"),
    [
        ({"size": (2000, 2000)}, "pixels are more"),
        ({"frames": 201}, "frames are more"),
        ({"steps": 7}, "does not do 7 steps"),
        ({"size": (63, 64)}, "cannot be made"),
        ({"deadline": 1.0}, "none: choose the number"),
        ({"strength": 0.5}, "does neither"),
    ],
)
def test_what_a_model_or_the_server_does_not_do_is_refused(tiny: Model, wishes: dict[str, Any], error: str) -> None:
    with pytest.raises((Refusal, UsageFailure), match=error):
        tiny.plan(Wanted(RED, wishes), None)


def test_prompts_are_checked_before_a_job_is_taken(tiny: Model) -> None:
    for prompt, error in (
        ("", "empty"),
        (" \n", "empty"),
        ("\u200b\x1b\0", "empty"),
        ("x" * 8001, "8001 characters"),
        ("\ud800", "UTF-8"),
    ):
        with pytest.raises((Refusal, UsageFailure), match=error):
            tiny.plan(Wanted(prompt), None)


def test_a_negative_prompt_has_the_prompt_s_limit(stills: Model) -> None:
    with pytest.raises(Refusal, match="8001 characters") as refusal:
        stills.plan(Wanted("a red circle", {"guidance": 2.0, "negative_prompt": "x" * 8001}), None)
    assert refusal.value.param == "negative_prompt"


def test_runs_that_take_too_much_memory_or_time_are_refused_before_they_start(tiny: Model) -> None:
    need = tiny.plan(Wanted(RED), None).memory_bytes
    assert need is not None
    with pytest.raises(Refusal, match="may use"):
        tiny.plan(Wanted(RED), need - 1)
    tiny.plan(Wanted(RED), need)
    slow = Model("slow", "builtin:tiny", EngineOptions(), Limits(seconds=1e-6))
    with pytest.raises(Refusal, match="would take about"):
        slow.plan(Wanted(RED), None)


def test_a_picture_gives_its_shape_and_is_bounded_before_it_is_decoded(stills: Model) -> None:
    picture = png(np.full((40, 80, 3), 200, np.uint8))
    plan = stills.plan(Wanted("a red circle", {"strength": 0.5}, picture=picture), None)
    assert plan.request["picture"] and plan.resolved["width"] > plan.resolved["height"]
    for broken in (b"", b"x", picture[:30], b"#EXTM3U\nfile:///etc/passwd"):
        with pytest.raises(Refusal, match="the picture is") as refusal:
            stills.plan(Wanted("a red circle", {"strength": 0.5}, picture=broken), None)
        assert refusal.value.param == "input_reference"
    small = Model("small", "builtin:tim-tiny", EngineOptions(), Limits(picture_pixels=1000))
    with pytest.raises(Refusal, match="megapixels"):
        small.plan(Wanted("a red circle", {"strength": 0.5}, picture=picture), None)


class Fake:
    """A model as a library sees it: what runs of it need, and which of its pipelines are open."""

    def __init__(self, name: str, need: int, low: int, opened: list[str]) -> None:
        self.name, self.need, self.low, self.opened = name, need, low, opened
        self.fits: Callable[[], bool] = lambda: True

    def estimate(self, _: object) -> Fake:
        return self

    def peak(self, memory: str) -> int:
        return self.need if memory == "all" else self.low

    def open(self, memory: str | None) -> Any:
        entry = f"{self.name} {memory}" if memory else self.name
        self.opened.append(entry)
        model = self

        class Pipeline:
            def choose_memory(self, _: object) -> None:
                if not model.fits():
                    raise RuntimeFailure("there is not enough memory")

            def close(self) -> None:
                model.opened.remove(entry)

        return Pipeline()


def test_as_many_models_stay_loaded_as_fit_and_the_oldest_goes_first() -> None:
    opened: list[str] = []
    a, b, c = (Fake(name, 40, 10, opened) for name in "abc")
    library = Library(100)
    first = library.pipeline(cast(Model, a), cast(Any, None))
    library.pipeline(cast(Model, b), cast(Any, None))
    assert library.pipeline(cast(Model, a), cast(Any, None)) is first
    library.pipeline(cast(Model, c), cast(Any, None))
    assert opened == ["a", "c"] and library.loaded == ("a", "c")
    c.need = 90
    library.pipeline(cast(Model, c), cast(Any, None))
    assert opened == ["c"]
    c.need = 200
    library.pipeline(cast(Model, c), cast(Any, None))
    assert opened == ["c low"]
    library.close()
    assert opened == []


def test_a_number_of_loaded_models_is_a_bound_as_well() -> None:
    opened: list[str] = []
    a, b = (Fake(name, 1, 1, opened) for name in "ab")
    library = Library(None, most_loaded=1)
    for model in (a, b, a):
        library.pipeline(cast(Model, model), cast(Any, None))
    assert opened == ["a"]


def test_others_leave_when_memory_turns_out_to_be_short() -> None:
    opened: list[str] = []
    a, b = (Fake(name, 1, 1, opened) for name in "ab")
    library = Library(None)
    library.pipeline(cast(Model, a), cast(Any, None))
    b.fits = lambda: opened == ["b"]
    library.pipeline(cast(Model, b), cast(Any, None))
    assert opened == ["b"]
    b.fits = lambda: False
    with pytest.raises(RuntimeFailure, match="not enough memory"):
        library.pipeline(cast(Model, b), cast(Any, None))


def test_embeddings_of_recent_prompts_stay_within_their_bytes() -> None:
    cache = EmbedsCache(most_bytes=100)
    for key in "abc":
        cache.put(key, Embedded(np.zeros(10, np.float32), None))
        cache.get("a")
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]


def job_of(model: Model, wanted: Wanted) -> Job:
    plan = model.plan(wanted, None)
    made = a_job(plan.group)
    return Job(made.id, model.name, plan.request, plan.resolved, plan.group, plan.seconds)


def test_a_prompt_that_comes_again_skips_the_encoder_and_gives_the_same_file(tiny: Model, tmp_path: Path) -> None:
    files = DataFolder(tmp_path)
    runner = Runner({"tiny": tiny}, Library(None), files, EmbedsCache())
    stages: list[set[str]] = []
    made = []
    wanted = Wanted(f"{RED} {'and on ' * 40}", {"seed": 3, "frames": 5})
    for _ in range(2):
        seen: set[str] = set()

        def show(progress: Progress, seen: set[str] = seen) -> bool:
            seen.add(progress.stage)
            return True

        job = job_of(tiny, wanted)
        result = runner.make(job, show, lambda _: None)
        stages.append(seen)
        made.append((result["sha256"], result["warnings"]))
    runner.close()
    assert "text" in stages[0] and "text" not in stages[1]
    assert made[0] == made[1]
    assert any("prompt" in warning for warning in made[0][1])  # it was cut, and the second run says so too


def test_fps_and_previews_do_what_they_say(tiny: Model, tmp_path: Path) -> None:
    import av

    files, previews = DataFolder(tmp_path), list[bytes]()
    runner = Runner({"tiny": tiny}, Library(None), files, EmbedsCache())
    job = job_of(tiny, Wanted(RED, {"seed": 3, "frames": 5, "steps": 3, "fps": 24}, preview=True))
    result = runner.make(job, lambda _: True, previews.append)
    runner.close()
    assert len(previews) == 2 and all(preview.startswith(b"\x89PNG") for preview in previews)
    with av.open(str(files.folder(job.id) / result["file"])) as video:
        assert video.streams.video[0].average_rate == 24
        assert sum(1 for _ in video.decode(video=0)) == 5


def test_a_meter_goes_from_nothing_to_all_and_never_back() -> None:
    from tmd_runtime import StepInfo

    seen: list[Progress] = []

    def show(progress: Progress) -> bool:
        seen.append(progress)
        return True

    meter = Meter({"backbone": 2, "decode": 2}, {"backbone": 3.0, "decode": 1.0}, 8.0, show)
    for step in (("load", 1, 6), ("backbone", 1, 2), ("backbone", 2, 2), ("decode", 1, 2), ("decode", 2, 2)):
        assert meter(StepInfo(*step, 0.1))
    assert [progress.fraction for progress in seen] == [0, 0.375, 0.75, 0.875, 1]
    assert seen[0].eta_seconds == pytest.approx(8.0, abs=0.2) and seen[-1].eta_seconds == 0


def test_a_bundle_that_cannot_make_a_video_is_refused_at_the_start(synthetic_bundle: Path) -> None:
    import json

    path = synthetic_bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in [name for name in manifest["graphs"] if name.startswith("decoder")]:
        graph = manifest["graphs"].pop(name)
        for file in [graph["file"], graph.get("data")]:
            manifest["files"].pop(file, None)
    path.write_text(json.dumps(manifest))
    with pytest.raises(RuntimeFailure, match="no graph decoder_first"):
        Model("half", synthetic_bundle, EngineOptions(), Limits())


def test_a_picture_becomes_the_first_frame_and_a_cached_negative_prompt_changes_nothing(tmp_path: Path) -> None:
    """Of a model that holds it and takes guidance: the file is that of `tmd-run`, also when the prompts are cached."""
    sampler = velocity_sampler(rule="unipc", steps=2, guidance=3.0, negative_prompt="a blue square")
    bundle = write_synthetic_bundle(tmp_path / "held", ("encoder", *GRAPHS), sampler, holds=True)
    model, files = Model("held", bundle, EngineOptions(threads=1), Limits()), DataFolder(tmp_path)
    assert model.card.options["image"] and model.card.options["strength"] is None
    picture = tmp_path / "start.png"
    picture.write_bytes(png(np.random.default_rng(5).integers(0, 256, (30, 50, 3), np.uint8)))
    runner = Runner({"held": model}, Library(None), files, EmbedsCache())
    made = []
    for _ in range(2):
        wanted = Wanted("a red circle", {"seed": 4, "frames": 5}, picture=picture.read_bytes())
        job = job_of(model, wanted)
        files.write(job.id, PICTURE, picture.read_bytes())
        made.append(files.folder(job.id) / runner.make(job, lambda _: True, lambda _: None)["file"])
    assert (runner.embeds.hits, runner.embeds.misses) == (1, 1)
    runner.close()
    out = tmp_path / "out.mp4"
    options = ["--bundle", bundle, "--prompt", "a red circle", "--seed", 4, "--frames", 5, "--threads", 1]
    done = CliRunner().invoke(tmd_run, [str(part) for part in [*options, "--image", picture, "--out", out, "--quiet"]])
    assert done.exit_code == 0, done.output
    assert [path.read_bytes() for path in made] == [out.read_bytes()] * 2


def test_a_model_of_classes_takes_a_label_and_no_prompt(tmp_path: Path) -> None:
    model = Model("numbers", write_tim_bundle(tmp_path / "classes", classes=True), EngineOptions(threads=1), Limits())
    options = model.card.options
    assert options["label"] and options["num_classes"] >= 2 and not options["negative_prompt"]
    for wanted, error in ((Wanted("a cat", {"label": 1}), "takes no prompt"), (Wanted(), "choose a class")):
        with pytest.raises(UsageFailure, match=error):
            model.plan(wanted, None)
    runner = Runner({"numbers": model}, Library(None), DataFolder(tmp_path), EmbedsCache())
    job = job_of(model, Wanted(wishes={"label": 1, "seed": 2, "steps": 2}))
    assert runner.make(job, lambda _: True, lambda _: None)["type"] == "image/png"
    assert job.resolved["label"] == 1
    runner.close()


def test_an_engine_that_is_not_here_is_named_if_it_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmd_runtime.pipeline.Pipeline.has_engines", lambda _: False)
    for options, part in (
        (EngineOptions(), "install one"),
        (EngineOptions("tensorrt"), "tensorrt on auto was chosen, and tmd-engine doctor says"),
        (EngineOptions(device="cuda"), "auto on cuda was chosen"),
    ):
        with pytest.raises(RuntimeFailure, match=part):
            Model("tiny", "builtin:tiny", options, Limits())
