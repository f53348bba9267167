"""The C++ library runs Transition Models as Python does, bit for bit: steps, schedules, deadlines, pictures."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tmd_runtime
from tests.helpers.cpp_tools import RUN, USAGE, ask_bundle, engine_options, pixels, twin
from tests.helpers.synthetic import TEXT_LENGTH, velocity_sampler, write_synthetic_bundle
from tests.helpers.synthetic_tim import CLASSES, write_plain_bundle, write_tim_bundle
from tmd_engines import Bundle
from tmd_engines.cost.sizing import estimate
from tmd_engines.cost.tiling import TILE_PIXELS
from tmd_runtime.built_in import BUILT_IN, BUNDLES
from tmd_runtime.sampling.deadline import steps_in_time
from tmd_runtime.sampling.schedule import tim_rope_tables
from tmd_runtime.text.tokenizer import Tokenizer

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stills")
    return {
        "tiny": BUNDLES / "tim-tiny",
        "text": write_tim_bundle(folder / "text", pictures=True),
        "guided": write_tim_bundle(folder / "guided", guidance=3.0),
        "classes": write_tim_bundle(folder / "classes", classes=True, guidance=2.0),
        "plain": write_plain_bundle(folder / "plain"),
    }


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engine(request: pytest.FixtureRequest) -> str:
    engine_options(request.param)
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def pipelines(bundles: dict[str, Path], engine: str) -> Iterator[dict[str, tmd_runtime.Pipeline]]:
    loaded = {name: tmd_runtime.load(path, engine=engine, threads=1) for name, path in bundles.items()}
    yield loaded
    for pipeline in loaded.values():
        pipeline.close()


def in_cpp(bundle: Path, engine: str, prompt: str | None = PROMPT, **wishes: Any) -> dict[str, Any]:
    given = {} if prompt is None else {"prompt": prompt}
    answer = ask_bundle("run", bundle, engine, wishes=wishes, **given)
    assert "ok" in answer, answer
    return answer


@pytest.mark.parametrize(
    ("name", "wishes"),
    [
        ("tiny", {"steps": 1}),
        ("tiny", {"steps": 7, "rho": 0.3}),
        ("tiny", {"schedule": [1.0, 0.7, 0.1, 0.0], "width": 96, "height": 64}),
        ("text", {}),
        ("guided", {}),
        ("guided", {"steps": 5, "guidance": 0.5, "negative_prompt": "a blue square"}),
        ("guided", {"steps": 1, "guidance": 4.0}),
        ("guided", {"guidance": 1.0}),
        ("guided", {"rho": 1.0, "steps": 6}),
        ("guided", {"rho": 1.0, "steps": 2}),
        ("classes", {"label": 3}),
        ("classes", {"label": 0, "guidance": 1.0, "steps": 2}),
        ("plain", {}),
        ("plain", {"negative_prompt": "a small blue square growing slowly"}),
    ],
    ids=str,
)
def test_stills_are_bit_equal(
    bundles: dict[str, Path], pipelines: dict[str, tmd_runtime.Pipeline], engine: str, name: str, wishes: dict[str, Any]
) -> None:
    given = dict(wishes)
    size = (given.pop("width"), given.pop("height")) if "width" in given else None
    prompt = None if name == "classes" else PROMPT
    expected = pipelines[name](prompt or "", seed=5, size=size, **given)
    found = in_cpp(bundles[name], engine, prompt, seed=5, **wishes)
    assert expected.frames.std() > 1, "a picture, not a flat colour"
    np.testing.assert_array_equal(pixels(found["ok"], expected.frames.shape), expected.frames)
    assert tuple(found["times"]) == expected.times and found["steps"] == len(expected.times) - 1
    assert found["warnings"].splitlines() == list(expected.warnings)
    fractions = found["fractions"]
    assert fractions[-1] == 1 and all(before <= after for before, after in pairwise(fractions))


def test_previews_are_bit_equal_and_change_nothing(
    bundles: dict[str, Path], pipelines: dict[str, tmd_runtime.Pipeline], engine: str
) -> None:
    seen: list[NDArray[np.uint8]] = []
    expected = pipelines["guided"](PROMPT, seed=5, steps=3, on_preview=seen.append)
    answer = ask_bundle("run", bundles["guided"], engine, prompt=PROMPT, wishes={"seed": 5, "steps": 3}, previews=True)
    assert len(answer["previews"]) == len(seen) == 2
    for found, wanted in zip(answer["previews"], seen, strict=True):
        np.testing.assert_array_equal(pixels(found, wanted.shape), wanted)
    np.testing.assert_array_equal(pixels(answer["ok"], expected.frames.shape), expected.frames)


@pytest.mark.parametrize("rule", ["euler", "unipc", "renoise", None], ids=str)
def test_previews_of_videos_are_bit_equal(tmp_path: Path, engine: str, rule: str | None) -> None:
    """Of the built-in student, and of models without inner flow with each rule."""
    if rule is None:
        bundle, wishes = BUILT_IN, {"seed": 5, "steps": 2, "inner_steps": 2, "frames": 9}
    else:
        sampler = velocity_sampler(rule=rule, steps=3, guidance=2.0)
        bundle, wishes = write_synthetic_bundle(tmp_path / "bundle", sampler=sampler), {"seed": 5}
    seen: list[NDArray[np.uint8]] = []
    with tmd_runtime.load(bundle, engine=engine, threads=1) as pipeline:
        expected = pipeline(PROMPT, on_preview=seen.append, **wishes)  # type: ignore[arg-type]
    answer = ask_bundle("run", bundle, engine, prompt=PROMPT, wishes=wishes, previews=True)
    assert len(answer["previews"]) == len(seen) == expected.steps - 1
    for found, wanted in zip(answer["previews"], seen, strict=True):
        np.testing.assert_array_equal(pixels(found, wanted.shape), wanted)
    np.testing.assert_array_equal(pixels(answer["ok"], expected.frames.shape), expected.frames)


def test_a_picture_is_encoded_and_changed_alike(
    bundles: dict[str, Path], pipelines: dict[str, tmd_runtime.Pipeline], engine: str
) -> None:
    """The larger one in tiles, of the encoder and of the decoder."""
    for width, height in ((64, 96), (TILE_PIXELS + 208, 64)):
        image = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
        latents = pipelines["text"].encode_image(image, (width, height))
        asked = {"rgb": image.tobytes().hex(), "width": width, "height": height}
        answer = ask_bundle("encode_image", bundles["text"], engine, **asked)
        assert answer["ok"] == latents.tobytes().hex() and answer["seconds"] > 0
        wishes: dict[str, Any] = {"strength": 0.6, "steps": 3, "seed": 5}
        expected = pipelines["text"](PROMPT, image=image, size=(width, height), **wishes)
        found = in_cpp(bundles["text"], engine, width=width, height=height, init_latents=answer["ok"], **wishes)
        np.testing.assert_array_equal(pixels(found["ok"], expected.frames.shape), expected.frames)
        assert tuple(found["times"]) == expected.times


@pytest.mark.parametrize("name", ["guided", "classes", "plain"])
def test_stages_one_by_one_give_the_same(
    bundles: dict[str, Path], pipelines: dict[str, tmd_runtime.Pipeline], engine: str, name: str
) -> None:
    wishes: dict[str, Any] = {"seed": 5, "steps": 3}
    if name == "classes":
        wishes["label"] = 2
        expected = pipelines[name].denoise(None, **wishes)
    elif name == "guided":
        wishes["guidance"] = 1.0  # the interface takes the embeddings of one negative prompt, and here there is none
        expected = pipelines[name].denoise(pipelines[name].encode(PROMPT), **wishes)
    else:
        expected = pipelines[name].denoise(pipelines[name].encode(PROMPT), **wishes)  # guided: null rows of the bundle
    answer = ask_bundle("stages", bundles[name], engine, prompt=PROMPT, wishes=wishes)
    assert answer["latents"] == expected.tobytes().hex()
    frames = pipelines[name].decode(expected)
    np.testing.assert_array_equal(pixels(answer["ok"], frames.shape), frames)
    rows = {"guided": TEXT_LENGTH, "classes": 0, "plain": pipelines["plain"].encode(PROMPT).shape[1]}
    assert answer["tokens"] == rows[name]
    assert rows["plain"] < TEXT_LENGTH


def test_a_deadline_is_planned_as_in_python() -> None:
    rng = np.random.default_rng(0)
    for fixed in (False, True):
        for times in ((1.0, 0.0), tuple(1 - np.arange(41) / 40), (0.8, 0.5, 0.3, 0.2, 0.0)):
            for span in (0.0, 0.4, 3.0, 50.0):
                left = np.sort(rng.uniform(-0.2, span, len(times)))[::-1].tolist()
                now, later = rng.uniform(0, 0.3, (2, len(times))).tolist()
                remaining, costs = iter(left), iter(zip(now, later, strict=True))
                ways = steps_in_time(times, fixed, lambda r=remaining: next(r), lambda _, c=costs: next(c))  # type: ignore[misc]
                way = [times[0], *(r for _, r in ways)]
                asked = {"times": times, "fixed": fixed, "left": left, "now": now, "later": later}
                assert twin().ask("steps_in_time", **asked)["ok"] == way


def test_a_deadline_decides_and_its_way_can_be_repeated(bundles: dict[str, Path], engine: str) -> None:
    short = in_cpp(bundles["guided"], engine, seed=5, deadline=1e-5)
    assert short["times"] == [1.0, 0.0] and short["steps"] == 1
    long = in_cpp(bundles["guided"], engine, seed=5, deadline=1000.0, steps=4)
    assert long["times"] == [1.0, 0.75, 0.5, 0.25, 0.0]
    again = in_cpp(bundles["guided"], engine, seed=5, schedule=long["times"])
    assert again["ok"] == long["ok"] and again["times"] == long["times"]
    assert long["ok"] == in_cpp(bundles["guided"], engine, seed=5, steps=4)["ok"]
    for answer in (short, long):
        assert answer["fractions"][-1] == 1 and all(b <= a for b, a in pairwise(answer["fractions"]))


def test_what_cannot_be_done_is_refused(bundles: dict[str, Path], engine: str) -> None:
    def status(name: str, prompt: str | None = PROMPT, previews: bool = False, memory: int = 0, **wishes: Any) -> Any:
        given = {} if prompt is None else {"prompt": prompt}
        answer = ask_bundle("run", bundles[name], engine, wishes=wishes, previews=previews, memory=memory, **given)
        return answer.get("status"), answer.get("error", "")

    assert status("text", strength=0.5) == (USAGE, status("text", strength=0.5)[1])
    latents = np.zeros((16, 8, 8), np.float32).tobytes().hex()
    for name, prompt, wishes, said in (
        ("text", PROMPT, {"strength": 0.5}, "there is none"),
        ("text", PROMPT, {"init_latents": latents}, "set a strength"),
        ("text", None, {}, "the prompt is NULL"),
        ("text", " \n", {}, "the prompt is empty"),
        ("plain", " \n", {}, "the prompt is empty"),
        ("classes", PROMPT, {"label": 1}, "takes no prompt"),
        ("classes", None, {}, "set the label, 0 to 4"),
        ("classes", None, {"label": CLASSES}, "there is no class 5"),
    ):
        found = status(name, prompt, **wishes)
        assert found[0] == USAGE and said in found[1], found
    code, text = status("text", previews=True, deadline=1.0)
    assert code == USAGE and "deadline" in text
    code, text = status("text", previews=True, memory=1)
    assert code == RUN and "TMD_MEMORY_ALL" in text
    code, text = status("text", memory=1)
    assert code is None
    image = {"rgb": "00" * 3 * 60 * 64, "width": 60, "height": 64}
    assert ask_bundle("encode_image", bundles["text"], engine, **image)["status"] == USAGE
    image["width"] = 64
    assert (
        ask_bundle("encode_image", bundles["guided"], engine, rgb="00" * 3 * 64 * 64, width=64, height=64)["status"]
        == RUN
    )


@pytest.mark.parametrize("text", [PROMPT, "Ünïcode  kept &amp; “as it is” cafÃ©", "a " * 60, "", "\u3000"], ids=ascii)
def test_plain_tokens_are_the_same(bundles: dict[str, Path], text: str) -> None:
    """Not cleaned, nothing refused as wrongly decoded, in their own length."""
    expected = Tokenizer(bundles["plain"] / "tokenizer.model", TEXT_LENGTH, 0, None, 2, plain=True)(text, True)
    answer = twin().ask("tokens", bundle=str(bundles["plain"]), text=text, may_be_empty=True)
    assert answer["ok"] == expected.input_ids[0].tolist() and answer["dropped"] == expected.dropped


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 2), (1024, 1)])
@pytest.mark.parametrize("rope", ["index", "grid"])
def test_rope_tables(grid: tuple[int, int], rope: str) -> None:
    for head_dim in (16, 72):
        cosine, sine = tim_rope_tables(*grid, head_dim, rope)
        answer = twin().ask("tim_rope", grid=grid, head_dim=head_dim, rope=rope)
        assert answer["ok"] == cosine.tobytes().hex() and answer["sine"] == sine.tobytes().hex()
    assert twin().ask("tim_rope", grid=(1025, 1), head_dim=16, rope=rope)["status"] == RUN


@pytest.mark.parametrize(("width", "height"), [(64, 64), (512, 512), (2048, 1024)])
def test_need_is_within_a_factor_of_two_of_what_python_counts(width: int, height: int) -> None:
    bundle = BUNDLES / "tim-tiny"
    counted = estimate(Bundle.open(bundle), width=width, height=height, frames=1)
    guessed = twin().ask("need", bundle=str(bundle), size=[1, height // 8, width // 8])["ok"]
    for mode, bytes_ in zip(("all", "low"), guessed, strict=True):
        assert 0.5 < bytes_ / counted.peak(mode) < 2  # type: ignore[arg-type]
