"""The pipeline does what the sampling rule says, tells what it does, and stops or fails cleanly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import tmd_engines
import tmd_runtime
from tests.helpers.synthetic import TEXT_LENGTH, write_synthetic_bundle
from tmd_engines import Bundle, BundleError
from tmd_runtime import Cancelled, NoiseStream, Pipeline, RuntimeFailure, StepInfo, UsageFailure
from tmd_runtime.memory import DENOISER
from tmd_runtime.sampling.schedule import rope_tables, shift_grid
from tmd_runtime.text.tokenizer import Tokenizer

PROMPT = "a red circle moving right on a black background"


@pytest.fixture
def pipeline(synthetic_bundle: Path) -> Pipeline:
    return tmd_runtime.load(synthetic_bundle, threads=1)


class PlainBundle:
    """The same graphs in onnx's own numpy evaluator, in the loop as the paper writes it: no buffers, no sharing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, graph: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        model = onnx.load(self._folder / f"{graph}.onnx")
        evaluator = ReferenceEvaluator(model)
        return dict(zip([output.name for output in model.graph.output], evaluator.run(None, inputs), strict=True))

    def encode(self, prompt: str) -> np.ndarray:
        tokens = Tokenizer(self._folder / "tokenizer.model", TEXT_LENGTH)(prompt)
        outputs = self.run("text_encoder", input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return outputs["prompt_embeds"]

    def denoise(
        self, prompt_embeds: np.ndarray, seed: int, outer: int, inner: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        t, s = shift_grid(outer, 10), shift_grid(inner, 10)
        cos, sin = rope_tables(shape[2], shape[3] // 2, shape[4] // 2, 16)
        stream = NoiseStream(seed)
        x = stream.normal(shape)
        for i in range(outer, 0, -1):
            rope = {"rope_cos": cos, "rope_sin": sin}
            m = self.run("backbone", x=x, t=np.array([t[i]], np.float32), prompt_embeds=prompt_embeds, **rope)
            y = noise = stream.normal(shape)
            for j in range(inner, 0, -1):
                times = {"s": np.array([s[j]], np.float32), "r": np.array([s[j - 1]], np.float32)}
                y = self.run("flow_head", y=y, noise=noise, **times, **m, **rope)["y_next"]
            x = x - np.float32(t[i] - t[i - 1]) * y
        return x

    def decode(self, latents: np.ndarray) -> np.ndarray:
        caches = self.run("decoder_first", latents=latents[:, :, :1])
        video = [caches.pop("frames")[0]]
        for k in range(1, latents.shape[2]):
            outputs = self.run("decoder_step", latents=latents[:, :, k : k + 1], **caches)
            video.append(outputs.pop("frames")[0])
            caches = {name.removesuffix("_next"): value for name, value in outputs.items()}
        return np.concatenate(video)


@pytest.mark.parametrize(
    ("outer", "inner", "frames", "size"),
    [(2, 2, 17, (64, 64)), (1, 1, 1, (32, 16)), (3, 4, 9, (48, 80)), (4, 1, 5, (16, 16))],
)
def test_stages_equal_a_plain_evaluation(
    synthetic_bundle: Path, pipeline: Pipeline, outer: int, inner: int, frames: int, size: tuple[int, int]
) -> None:
    plain = PlainBundle(synthetic_bundle)
    prompt_embeds = plain.encode(PROMPT)
    np.testing.assert_allclose(pipeline.encode(PROMPT), prompt_embeds, atol=1e-6)

    shape = (1, 16, (frames - 1) // 4 + 1, size[1] // 8, size[0] // 8)
    expected = plain.denoise(prompt_embeds, 7, outer, inner, shape)
    latents = pipeline.denoise(prompt_embeds, seed=7, steps=outer, inner_steps=inner, frames=frames, size=size)
    assert latents.shape == shape and latents.dtype == np.float32
    np.testing.assert_allclose(latents, expected, atol=1e-4)

    video = pipeline.decode(latents)
    assert video.shape == (frames, size[1], size[0], 3) and video.dtype == np.uint8
    # One level: the two engines may round a value to different sides.
    assert np.abs(video.astype(int) - plain.decode(latents)).max() <= 1


def test_a_call_is_its_stages(pipeline: Pipeline) -> None:
    result = pipeline(PROMPT, seed=5)
    assert np.array_equal(result.frames, pipeline.decode(pipeline.denoise(pipeline.encode(PROMPT), seed=5)))
    assert (result.seed, result.steps, result.inner_steps, result.fps) == (5, 2, 2, 8)
    assert (result.width, result.height, len(result.frames), result.prompt) == (64, 64, 17, PROMPT)
    assert result.nfe == pytest.approx(2 * (1 + 1 / 2))


def test_same_seed_same_video_whatever_ran_before(synthetic_bundle: Path, pipeline: Pipeline) -> None:
    first = pipeline(PROMPT, seed=1).frames
    pipeline("a blue square", seed=2, frames=5, size=(32, 48), steps=3, inner_steps=4)
    pipeline("a blue square", seed=2)
    assert np.array_equal(pipeline(PROMPT, seed=1).frames, first)
    assert np.array_equal(tmd_runtime.load(synthetic_bundle, threads=1)(PROMPT, seed=1).frames, first)
    assert not np.array_equal(pipeline(PROMPT, seed=2).frames, first)
    assert not np.array_equal(pipeline("a blue square", seed=1).frames, first)


def test_without_a_seed_each_run_draws_one_and_tells_it(pipeline: Pipeline) -> None:
    one, two = pipeline(PROMPT, frames=1), pipeline(PROMPT, frames=1)
    assert one.seed != two.seed
    assert np.array_equal(pipeline(PROMPT, frames=1, seed=one.seed).frames, one.frames)


def test_timings_tell_cold_from_warm(pipeline: Pipeline) -> None:
    cold, warm = (pipeline(PROMPT).stage_seconds for _ in range(2))
    assert list(cold) == list(warm) == ["load", "text", "noise", "backbone", "flow_head", "decode"]
    assert cold["load"] > 0 and warm["load"] == 0
    assert all(warm[stage] > 0 for stage in warm if stage != "load")


def test_graphs_are_loaded_by_the_stage_that_needs_them(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    original = tmd_engines.load

    def load(bundle: Bundle, graph: str, **options: Any) -> Any:
        loaded.append(graph)
        return original(bundle, graph, **options)

    monkeypatch.setattr(tmd_engines, "load", load)
    prompt_embeds = pipeline.encode(PROMPT)
    assert loaded == ["text_encoder"]
    latents = pipeline.denoise(prompt_embeds, frames=1)
    assert loaded == ["text_encoder", "backbone", "flow_head", "update"]
    pipeline.decode(latents)
    assert loaded[4:] == ["decoder_first"], "one picture needs no step"
    pipeline(PROMPT)
    pipeline(PROMPT)
    assert loaded[5:] == ["decoder_step"], "each graph is loaded once"
    pipeline.close()
    pipeline(PROMPT)
    assert len(loaded) == 12, "a closed pipeline loads again"


def test_callback_hears_of_every_step_in_order(pipeline: Pipeline) -> None:
    steps: list[StepInfo] = []
    pipeline(PROMPT, steps=2, inner_steps=4, frames=9, callback=steps.append)
    heard = [(step.stage, step.done, step.total) for step in steps if step.stage != "load"]
    inner = [[("flow_head", i * 4 + k, 8) for k in (1, 2, 3, 4)] for i in (0, 1)]
    assert heard == [
        ("text", 1, 1),
        ("backbone", 1, 2),
        *inner[0],
        ("backbone", 2, 2),
        *inner[1],
        *[("decode", k, 3) for k in (1, 2, 3)],
    ]
    assert [step.done for step in steps if step.stage == "load"] == [1, 2, 3, 4, 5, 6]
    assert all(step.seconds >= 0 for step in steps)


@pytest.mark.parametrize("stage", ["load", "text", "backbone", "flow_head", "decode"])
@pytest.mark.parametrize("answer", [False, np.False_])
def test_callback_stops_the_run_within_a_step(pipeline: Pipeline, stage: str, answer: object) -> None:
    expected = pipeline(PROMPT, seed=3).frames if stage != "load" else None
    after: list[str] = []

    def stop(step: StepInfo) -> Any:
        after.append(step.stage)
        return answer if step.stage == stage else None

    with pytest.raises(Cancelled, match=stage):
        pipeline(PROMPT, seed=3, callback=stop)
    assert after.count(stage) == 1 and after[-1] == stage
    # The pipeline is as good as new.
    again = pipeline(PROMPT, seed=3, callback=lambda step: True).frames
    assert expected is None or np.array_equal(again, expected)


def test_ctrl_c_leaves_a_pipeline_that_works(pipeline: Pipeline) -> None:
    expected = pipeline(PROMPT, seed=3).frames

    def interrupt(step: StepInfo) -> None:
        if step.stage == "flow_head":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(PROMPT, seed=3, callback=interrupt)
    assert np.array_equal(pipeline(PROMPT, seed=3).frames, expected)


def test_pieces_come_while_decoding_and_are_the_callers(pipeline: Pipeline) -> None:
    pieces: list[np.ndarray] = []
    decoded: list[int] = []

    def on_frames(frames: np.ndarray) -> None:
        decoded.append(len(steps))
        pieces.append(frames)

    steps: list[StepInfo] = []
    result = pipeline(
        PROMPT, seed=1, callback=lambda s: steps.append(s) if s.stage == "decode" else None, on_frames=on_frames
    )
    assert [len(piece) for piece in pieces] == [1, 4, 4, 4, 4]
    assert decoded == [1, 2, 3, 4, 5], "each piece comes before the next one is decoded"
    assert np.array_equal(np.concatenate(pieces), result.frames)


class Poisoned:
    """An engine whose output `name` is spoilt after each run."""

    def __init__(self, engine: Any, name: str, value: float) -> None:
        self._engine, self._name, self._value = engine, name, value

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._engine, attribute)

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], None]:
        step = self._engine.bind(inputs, outputs)

        def run() -> None:
            step()
            outputs[self._name].reshape(-1)[-1] = self._value

        return run

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self.bind(inputs, outputs)()


@pytest.mark.parametrize(
    ("graph", "output", "stage"),
    [
        ("text_encoder", "prompt_embeds", "text"),
        ("backbone", "features", "backbone"),
        ("update", "magnitude", "flow_head"),
        ("flow_head", "y_next", "flow_head"),
        ("decoder_first", "magnitude", "decode"),
        ("decoder_step", "magnitude", "decode"),
        ("decoder_first", "cache_31", "decode"),  # the next call reads it
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_name_their_stage(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, graph: str, output: str, stage: str, value: float
) -> None:
    original = tmd_engines.load

    def load(bundle: Bundle, name: str, **options: Any) -> Any:
        engine = original(bundle, name, **options)
        return Poisoned(engine, output, value) if name == graph else engine

    monkeypatch.setattr(tmd_engines, "load", load)
    with pytest.raises(RuntimeFailure, match=f"stage {stage} gave NaN or Inf"):
        pipeline(PROMPT)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"steps": 5}, "does not do 5 steps: choose 1, 2, 3 or 4 .default 2."),
        ({"steps": 0}, "does not do 0 steps"),
        ({"inner_steps": 3}, "does not do 3 inner steps: choose 1, 2 or 4"),
        ({"frames": 6}, "6 frames cannot be made: choose 1 plus a multiple of 4, such as 5 or 9"),
        ({"frames": 0}, "such as 1 or 5"),
        ({"frames": -3}, "such as 1 or 5"),
        ({"frames": 4097}, "4097 frames are more than the model has positions for: choose at most 4093"),
        ({"size": (60, 64)}, "width of 60 pixels cannot be made: choose a multiple of 16, such as 48 or 64"),
        ({"size": (64, 8)}, "height of 8 pixels cannot be made: choose a multiple of 16, such as 16 or 32"),
        ({"size": (64, 0)}, "height of 0 pixels"),
        ({"size": (16400, 64)}, "choose at most 16384"),
        ({"seed": -1}, "seed -1 is out of range: give a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "which reads 32 bits of a seed, so a larger one would give the video of another"),
        ({"seed": 2**64}, "out of range"),
    ],
)
def test_impossible_wishes_say_what_is_possible(pipeline: Pipeline, wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageFailure, match=message):
        pipeline(PROMPT, **wishes)
    with pytest.raises(UsageFailure, match=message):
        pipeline.settings(**wishes)


def test_another_size_than_the_models_is_noted(pipeline: Pipeline) -> None:
    assert pipeline(PROMPT).warnings == ()
    (warning,) = pipeline(PROMPT, frames=5, size=(32, 64)).warnings
    assert "made for 17 frames of 64x64" in warning and "5 of 32x64" in warning


def test_a_long_prompt_is_noted(pipeline: Pipeline) -> None:
    (warning,) = pipeline(PROMPT * 20, frames=1, size=(64, 64)).warnings[1:]
    assert "too long" in warning


def test_an_empty_prompt_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(UsageFailure, match="prompt is empty"):
        pipeline("  ")


def test_a_bundle_without_text_encoder_denoises_and_says_what_it_lacks(tmp_path: Path) -> None:
    bundle = write_synthetic_bundle(tmp_path / "b", (*DENOISER, "decoder_first", "decoder_step"))
    pipeline = tmd_runtime.load(bundle, threads=1)
    with pytest.raises(RuntimeFailure, match=r"no graph text_encoder, so it cannot read a prompt.*--parts"):
        pipeline(PROMPT)
    prompt_embeds = np.zeros((1, 7, 64), np.float32)
    assert pipeline.decode(pipeline.denoise(prompt_embeds, seed=0)).shape == (17, 64, 64, 3)


def test_a_bundle_without_update_says_how_to_get_one(tmp_path: Path) -> None:
    parts = ("text_encoder", "backbone", "flow_head")
    pipeline = tmd_runtime.load(write_synthetic_bundle(tmp_path / "b", parts), threads=1)
    with pytest.raises(RuntimeFailure, match=r"no graph update, so it cannot denoise.*flow_head among --parts"):
        pipeline(PROMPT, on_latents=lambda latents: None)


@pytest.mark.parametrize("shape", [(7, 64), (2, 7, 64), (1, 7, 32)])
def test_wrong_embeddings_are_named(pipeline: Pipeline, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeFailure, match=r"prompt_embeds must be \[1, text, 64\]"):
        pipeline.denoise(np.zeros(shape, np.float32))
    with pytest.raises(RuntimeFailure, match=r"prompt_embeds must be \[1, text, 64\]"):
        pipeline(PROMPT, prompt_embeds=np.zeros(shape, np.float32))


def test_embeddings_with_nan_are_refused_before_the_backbone_reads_them(pipeline: Pipeline) -> None:
    embeds = np.zeros((1, 7, 64), np.float32)
    embeds[0, 3, 5] = np.nan
    for run in (lambda: pipeline.denoise(embeds, frames=1), lambda: pipeline(PROMPT, prompt_embeds=embeds, frames=1)):
        with pytest.raises(UsageFailure, match="the embeddings hold NaN or Inf"):
            run()


@pytest.mark.parametrize("shape", [(16, 5, 8, 8), (1, 15, 5, 8, 8), (1, 16, 0, 8, 8)])
def test_wrong_latents_are_named(pipeline: Pipeline, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeFailure, match=r"latents must be \[1, 16, frames, height, width\]"):
        pipeline.decode(np.zeros(shape, np.float32))


def test_latents_with_nan_are_not_decoded(pipeline: Pipeline) -> None:
    with pytest.raises(RuntimeFailure, match="denoise gave NaN"):
        pipeline.decode(np.full((1, 16, 1, 8, 8), np.nan, np.float32))


def test_a_size_beyond_memory_is_one_sentence(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("tmd_runtime.sampling.tmd.TmdLoop", too_much)
    with pytest.raises(RuntimeFailure, match="not enough memory for 17 frames of 64x64"):
        pipeline(PROMPT)


def test_without_built_in_model_load_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageFailure, match="no built-in bundle 'big': choose one of tim-tiny, tiny"):
        tmd_runtime.load("builtin:big")
    monkeypatch.setattr("tmd_runtime.built_in.BUNDLES", tmp_path / "none")
    with pytest.raises(RuntimeFailure, match="no built-in model"):
        tmd_runtime.load()


def test_decoder_graphs_of_different_exports_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers import synthetic

    def other_step() -> synthetic.GraphBuilder:
        builder = synthetic._decoder("decoder_step", 4)
        monkeypatch.setattr(synthetic, "CACHES", 31)
        return builder

    monkeypatch.setattr(synthetic, "decoder_first", lambda: synthetic._decoder("decoder_first", 1))
    monkeypatch.setattr(synthetic, "decoder_step", other_step)
    # decoder_step is written first, with 32 caches; decoder_first then has 31.
    graphs = ("text_encoder", *DENOISER, "decoder_step", "decoder_first")
    with pytest.raises(BundleError, match="do not pass the same caches"):
        write_synthetic_bundle(tmp_path / "b", graphs)


def test_nothing_goes_over_a_network(synthetic_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a run opened a connection")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    result = tmd_runtime.load(synthetic_bundle, threads=1)(PROMPT)
    tmd_runtime.write_video(tmp_path / "v.mp4", result.frames, result.fps)
