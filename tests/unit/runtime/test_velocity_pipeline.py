"""Models without inner flow (family wan) in the pipeline: rules, guidance, memory, and stages that can be left out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import tmd_engines
import tmd_runtime
from tests.helpers.results import result_latents
from tests.helpers.synthetic import velocity_sampler, write_synthetic_bundle
from tests.helpers.watch import Watch
from tmd_engines.cost import sizing as engine_sizing
from tmd_engines.cost import system_memory
from tmd_ref.samplers import unipc_sample
from tmd_runtime import NoiseStream, RuntimeFailure, StepInfo, UsageFailure
from tmd_runtime.memory import DENOISER
from tmd_runtime.sampling.schedule import rope_tables, told_time
from tmd_runtime.sampling.update import Updater

PROMPT, NEGATIVE = "a red circle moving right", "a blue square"
RCM = [0.987654, 0.933781, 0.852895, 0.608979]
SAMPLERS = {
    "unipc": velocity_sampler(guidance=5.0, negative_prompt=NEGATIVE),
    "renoise": velocity_sampler(
        rule="renoise",
        steps=4,
        allowed_steps=[1, 2, 3, 4],
        times=RCM,
        time_rounding="bfloat16",
        init_scale=RCM[0],
    ),
    "euler": velocity_sampler(rule="euler", steps=2, allowed_steps=[2], times=[1.0, 0.8333], time_rounding="none"),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wan")
    return {name: write_synthetic_bundle(folder / name, sampler=sampler) for name, sampler in SAMPLERS.items()}


def plain_velocity(folder: Path) -> Callable[..., torch.Tensor]:
    """Both graphs in onnx's own numpy evaluator, as the model that `tmd_ref.samplers` asks for."""
    graphs = {name: ReferenceEvaluator(onnx.load(folder / f"{name}.onnx")) for name in ("backbone", "flow_head")}

    def velocity(x: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        _, _, frames, height, width = x.shape
        cos, sin = rope_tables(frames, height // 2, width // 2, 16)
        given = {"x": x.float().numpy(), "t": t.float().numpy(), "rope_cos": cos, "rope_sin": sin}
        features, context = graphs["backbone"].run(None, {**given, "prompt_embeds": prompt_embeds.numpy()})
        (found,) = graphs["flow_head"].run(None, {**given, "features": features, "context": context})
        return torch.from_numpy(found)

    return velocity


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_unipc_with_guidance_equals_the_reference(bundles: dict[str, Path], guidance: float) -> None:
    pipeline = tmd_runtime.load(bundles["unipc"], threads=1)
    result = pipeline(PROMPT, seed=7, frames=5, size=(48, 32), guidance=guidance, steps=4, shift=5.0)
    positive, negative = (torch.from_numpy(pipeline.encode(text)) for text in (PROMPT, NEGATIVE))
    noise = torch.from_numpy(NoiseStream(7).normal((1, 16, 2, 4, 6)))
    field = plain_velocity(bundles["unipc"])
    expected = unipc_sample(field, noise, positive, negative, steps=4, shift=5.0, guidance=guidance)
    assert result.latents is not None
    np.testing.assert_allclose(result.latents, expected.numpy(), atol=1e-4)
    assert (result.rule, result.guidance, result.nfe) == ("unipc", guidance, 4 * (1 if guidance == 1 else 2))
    assert np.array_equal(pipeline.decode(result.latents), result.frames) and result.frames.shape == (5, 32, 48, 3)


@pytest.mark.parametrize(("rule", "steps"), [("renoise", 4), ("renoise", 2), ("euler", 2)])
def test_fixed_times_equal_the_formula(bundles: dict[str, Path], rule: str, steps: int) -> None:
    """The first `steps` times of the list, the network told rounded times, the first noise scaled."""
    pipeline = tmd_runtime.load(bundles[rule], threads=1)
    prompt_embeds, shape = pipeline.encode(PROMPT), (1, 16, 2, 4, 6)
    sampler, stream = SAMPLERS[rule], NoiseStream(7)
    times = [*sampler["times"][:steps], 0.0]
    model = plain_velocity(bundles[rule])
    x = sampler["init_scale"] * stream.normal(shape).astype(np.float64)
    for t, after in pairwise(times):
        told = torch.tensor([told_time(t, sampler["time_rounding"])])
        v = model(torch.from_numpy(x), told, torch.from_numpy(prompt_embeds)).numpy()
        if rule == "euler":
            x = x + (after - t) * v
        else:
            x = (1 - after) * (x - t * v) + (after * stream.normal(shape) if after else 0)
    latents = pipeline.denoise(prompt_embeds, seed=7, steps=steps, frames=5, size=(48, 32))
    np.testing.assert_allclose(latents, x, atol=1e-4)


def test_callback_counts_both_passes(bundles: dict[str, Path]) -> None:
    heard: list[StepInfo] = []
    tmd_runtime.load(bundles["unipc"], threads=1)(PROMPT, frames=1, steps=2, callback=heard.append)
    steps = [(step.stage, step.done, step.total) for step in heard if step.stage != "load"]
    both = [(stage, number, 4) for number in (1, 2, 3, 4) for stage in ("backbone", "flow_head")]
    assert steps == [("text", 1, 2), ("text", 2, 2), *both, ("decode", 1, 1)]


def test_negative_prompt_is_encoded_once_for_many_prompts(bundles: dict[str, Path]) -> None:
    pipeline = tmd_runtime.load(bundles["unipc"], threads=1)
    heard: list[str] = []
    first = pipeline(PROMPT, seed=1, frames=1)
    again = pipeline(PROMPT, seed=1, frames=1, callback=lambda step: heard.append(step.stage))
    assert heard.count("text") == 1 and np.array_equal(first.frames, again.frames)
    for other in ("", "an orange star"):
        changed = pipeline(PROMPT, seed=1, frames=1, negative_prompt=other)
        assert not np.array_equal(result_latents(changed), result_latents(first))


@pytest.mark.parametrize(
    ("rule", "wishes", "message"),
    [
        ("unipc", {"inner_steps": 2}, "no inner steps, so it cannot do 2"),
        ("unipc", {"steps": 1001}, "1001 steps cannot be done: choose 1 to 1000 .default 3."),
        ("unipc", {"steps": 0}, "0 steps cannot be done"),
        ("unipc", {"shift": 0.5}, "shift of 0.5 is out of range"),
        ("unipc", {"guidance": -1.0}, "guidance of -1 is out of range"),
        ("unipc", {"guidance": float("nan")}, "guidance must be a finite number, not nan"),
        ("unipc", {"guidance": 1.0, "negative_prompt": "x"}, "a negative prompt needs guidance"),
        ("renoise", {"negative_prompt": "x"}, "a negative prompt needs guidance"),
        ("renoise", {"shift": 3.0}, "fixed times, which have no shift"),
        ("renoise", {"steps": 5}, "does not do 5 steps: choose 1, 2, 3 or 4"),
        ("euler", {"steps": 1}, "does not do 1 steps: choose 2"),
    ],
)
def test_impossible_wishes_say_what_is_possible(
    bundles: dict[str, Path], rule: str, wishes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageFailure, match=message):
        tmd_runtime.load(bundles[rule], threads=1).settings(**wishes)


@pytest.mark.parametrize("wishes", [{"guidance": 5.0}, {"negative_prompt": "x"}, {"shift": 5.0}])
def test_a_student_takes_no_guidance(synthetic_bundle: Path, wishes: dict[str, Any]) -> None:
    pipeline = tmd_runtime.load(synthetic_bundle, threads=1)
    with pytest.raises(UsageFailure, match="TMD student, which takes no"):
        pipeline.settings(**wishes)
    assert pipeline.settings(guidance=1).passes == 1


def test_guidance_for_a_distilled_model_is_noted(bundles: dict[str, Path]) -> None:
    settings = tmd_runtime.load(bundles["renoise"], threads=1).settings(guidance=3.0)
    assert settings.passes == 2 and "without guidance" in settings.warnings[0]


def test_embeddings_take_the_place_of_prompts(bundles: dict[str, Path], tmp_path: Path) -> None:
    full = tmd_runtime.load(bundles["unipc"], threads=1)
    kept: list[Any] = []
    expected = full(PROMPT, seed=1, on_embeds=lambda *embeds: kept.extend(embeds), on_latents=kept.append)
    positive, negative, latents = kept
    assert np.array_equal(positive, full.encode(PROMPT)) and np.array_equal(latents, result_latents(expected))

    graphs = (*DENOISER, "decoder_first", "decoder_step")
    lean = tmd_runtime.load(write_synthetic_bundle(tmp_path / "lean", graphs, SAMPLERS["unipc"]), threads=1)
    result = lean("", seed=1, prompt_embeds=positive, negative_embeds=negative)
    assert np.array_equal(result.frames, expected.frames) and result.stage_seconds["text"] == 0
    with pytest.raises(RuntimeFailure, match=r"no graph text_encoder.*--embeds FILE"):
        lean("", seed=1, prompt_embeds=positive)
    with pytest.raises(UsageFailure, match="guidance needs negative_embeds"):
        lean.denoise(positive)
    with pytest.raises(RuntimeFailure, match="negative_embeds must have the shape"):
        lean.denoise(positive, negative_embeds=negative[:, :3])
    assert np.array_equal(lean.denoise(positive, seed=1, negative_embeds=negative), latents)


def test_a_bundle_may_end_where_its_parts_end(tmp_path: Path) -> None:
    sampler = SAMPLERS["unipc"]
    kept: list[Any] = []
    reader = tmd_runtime.load(write_synthetic_bundle(tmp_path / "text", ("text_encoder",), sampler), threads=1)
    result = reader(PROMPT, on_embeds=lambda *embeds: kept.append(embeds))
    assert len(kept) == 1 and result.latents is None and result.frames.shape == (0, 64, 64, 3)
    with pytest.raises(RuntimeFailure, match=r"no graph backbone, so it cannot denoise.*--save-embeds"):
        reader(PROMPT)
    parts = ("text_encoder", *DENOISER)
    denoiser = tmd_runtime.load(write_synthetic_bundle(tmp_path / "dit", parts, sampler), threads=1)
    result = denoiser(PROMPT, on_latents=kept.append)
    assert np.array_equal(kept[1], result_latents(result)) and len(result.frames) == 0
    with pytest.raises(RuntimeFailure, match=r"no graph decoder_first.*--save-latents"):
        denoiser(PROMPT)


def test_low_memory_has_one_stage_after_the_other(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tmd_runtime.load(bundles["unipc"], threads=1, memory="all")(PROMPT, seed=1)
    watch = Watch(monkeypatch)
    pipeline = tmd_runtime.load(bundles["unipc"], threads=1, memory="low")
    for _ in range(2):
        result = pipeline(PROMPT, seed=1)
        assert np.array_equal(result.frames, expected.frames) and result.memory == "low"
        assert not watch.loaded, "nothing stays"
    stages = [{"text_encoder"}, {"backbone"}, {"backbone", "flow_head"}, {*DENOISER}, {"decoder_first"}]
    one_run = [*stages, {"decoder_first", "decoder_step"}]
    # The negative prompt is remembered, the prompt is not.
    assert watch.together == one_run * 2
    # A run that is stopped leaves nothing behind either, and stages alone do as a run does.
    with pytest.raises(tmd_runtime.Cancelled):
        pipeline(PROMPT, callback=lambda step: step.stage != "flow_head")
    pipeline.decode(pipeline.denoise(pipeline.encode(PROMPT), guidance=1))
    assert not watch.loaded
    watch.together.clear()
    tmd_runtime.load(bundles["unipc"], threads=1, memory="all")(PROMPT)
    assert len(watch.together[-1]) == 6


@pytest.mark.parametrize(
    ("free", "memory"), [(1 << 40, "all"), (None, "all"), ("between", "low"), (1 << 20, RuntimeFailure)]
)
def test_auto_memory_takes_what_fits(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, free: Any, memory: Any
) -> None:
    pipeline = tmd_runtime.load(bundles["unipc"], threads=1)
    need = engine_sizing.estimate(pipeline.bundle, width=64, height=64, frames=17, guidance_passes=2)
    between = (need.peak("all") + need.peak("low")) // 2
    assert need.peak("low") < between
    monkeypatch.setattr(engine_sizing, "available_bytes", lambda: between if free == "between" else free)
    monkeypatch.setattr(system_memory, "resident_bytes", lambda: 0)
    if memory is RuntimeFailure:
        with pytest.raises(RuntimeFailure, match=r"not enough memory for 17 frames of 64x64.*GB are free.*--memory"):
            pipeline(PROMPT)
        with pytest.raises(RuntimeFailure, match=r"not enough memory for 17 frames of 64x64"):
            pipeline.decode(np.zeros((1, 16, 5, 8, 8), np.float32))
        # Whoever names a mode knows better.
        assert tmd_runtime.load(bundles["unipc"], threads=1, memory="low")(PROMPT).memory == "low"
    else:
        assert pipeline(PROMPT).memory == memory


def test_graphs_that_are_loaded_need_no_memory_again(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tmd_runtime.load(bundles["unipc"], threads=1)
    found = engine_sizing.estimate(pipeline.bundle, width=64, height=64, frames=17)
    weights = sum(stage.weight_bytes for stage in found.stages.values())
    monkeypatch.setattr(system_memory, "resident_bytes", lambda: 0)
    monkeypatch.setattr(engine_sizing, "available_bytes", lambda: found.peak("all"))
    assert pipeline(PROMPT).memory == "all"
    monkeypatch.setattr(engine_sizing, "available_bytes", lambda: found.peak("all") - weights)
    assert pipeline(PROMPT).memory == "all"
    assert tmd_runtime.load(bundles["unipc"], threads=1)(PROMPT).memory == "low"
    # Without the text encoder there is as much less to fit.
    text = found.stages["text_encoder"].total_bytes
    monkeypatch.setattr(engine_sizing, "available_bytes", lambda: found.peak("all") - text)
    lean = tmd_runtime.load(bundles["unipc"], threads=1)
    embeds = np.ones((1, 32, 64), np.float32)
    assert lean("", prompt_embeds=embeds, negative_embeds=embeds).memory == "all"


def test_what_the_process_holds_already_is_not_needed_twice(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tmd_runtime.load(bundles["unipc"], threads=1)
    found = engine_sizing.estimate(pipeline.bundle, width=64, height=64, frames=17, guidance_passes=2)
    monkeypatch.setattr(engine_sizing, "available_bytes", lambda: found.peak("all") - engine_sizing.BASE_BYTES)
    monkeypatch.setattr(system_memory, "resident_bytes", lambda: 10 * engine_sizing.BASE_BYTES)
    assert pipeline(PROMPT).memory == "all"


def test_unknown_memory_mode_is_refused(bundles: dict[str, Path]) -> None:
    with pytest.raises(UsageFailure, match="no memory mode 'some': choose one of auto, all, low"):
        tmd_runtime.load(bundles["unipc"], memory="some")


def test_binding_an_update_counts_as_loading(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine may compile there, and what a run uses of the update shows only when it runs."""
    pipeline = tmd_runtime.load(bundles["euler"], engine="onnxruntime")
    pipeline(PROMPT, seed=1, frames=1, size=(32, 32))
    bind = Updater.bind

    def slow(*arguments: Any, **buffers: Any) -> Any:
        sleep(0.1)
        return bind(*arguments, **buffers)

    monkeypatch.setattr(Updater, "bind", slow)
    guided = pipeline(PROMPT, seed=1, frames=1, size=(32, 32), guidance=2.0)  # with the slot `negative`
    again = pipeline(PROMPT, seed=1, frames=1, size=(32, 32), guidance=2.0)
    assert guided.stage_seconds["load"] >= 0.1 > again.stage_seconds["load"]


@pytest.mark.parametrize("graph", ["backbone", "flow_head"])
@pytest.mark.parametrize("which", ["negative", "positive"])
def test_nan_of_either_pass_names_the_stage_that_made_it(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, graph: str, which: str
) -> None:
    """In the second step, where the one pass gives NaN and the other does not."""
    load = tmd_engines.load

    class Spoilt:
        """The engine of `graph`, which gives NaN where the prompt is the one of that pass, if x has moved."""

        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self._engine, attribute)

        def bind(self, inputs: Any, outputs: Any) -> Callable[[], None]:
            step = self._engine.bind(inputs, outputs)
            told = inputs["prompt_embeds"] if graph == "backbone" else inputs["context"]

            def run() -> None:
                step()
                first.setdefault("positive" if len(seen) % 2 else "negative", told.copy())
                seen.append(inputs["t"].copy())
                if seen[0] != inputs["t"] and np.array_equal(told, first[which]):
                    next(iter(outputs.values())).reshape(-1)[-1] = np.nan

            return run

    seen: list[Any] = []
    first: dict[str, Any] = {}
    monkeypatch.setattr(
        tmd_engines, "load", lambda *it, **more: Spoilt(load(*it, **more)) if it[1] == graph else load(*it, **more)
    )
    pipeline = tmd_runtime.load(bundles["unipc"], engine="onnxruntime")
    with pipeline, pytest.raises(RuntimeFailure, match=f"the stage {graph} gave NaN"):
        pipeline(PROMPT, seed=1, frames=1, size=(32, 32))
    assert len(first) == 2 and len(seen) > 3
