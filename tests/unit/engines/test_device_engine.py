"""The device path, run for real on the CPU's memory and ONNX Runtime's CPU provider: loops, arrays, engine.

On a GPU the same code has another provider. What is different there (memory of CUDA, CUDA graphs) is not tested here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.engine_tools import buffers, plain_session
from tests.helpers.synthetic import GRAPHS, velocity_sampler, write_synthetic_bundle
from tests.helpers.synthetic_tim import write_tim_bundle
from tmd_engines import Bundle, EngineError, load
from tmd_engines.bundle.families.rules import RULES
from tmd_engines.onnxruntime.gpu_engine import OnnxRuntimeDeviceEngine, OrtArray
from tmd_runtime import RuntimeFailure, Settings
from tmd_runtime.clock import StepInfo, Timings
from tmd_runtime.sampling import family_of, resolve_settings

SHAPE = (2, 3, 5, 7)


class Recording(OnnxRuntimeDeviceEngine):
    """Counts launches; what is recorded is the work itself."""

    records = True
    launches = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        def launch() -> None:
            Recording.launches += 1
            work()

        return launch


def on_device(bundle: Bundle, graph: str, kind: type[OnnxRuntimeDeviceEngine] = OnnxRuntimeDeviceEngine) -> Any:
    return kind(bundle, graph, "cpu", 1)


def pair(seed: int = 0) -> tuple[np.ndarray, OrtArray]:
    values = np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
    array = OrtArray("cpu", SHAPE, "float32")
    array[...] = values
    return values, array


def test_arrays_are_written_read_and_copied() -> None:
    (x, dx), (_, dy) = pair(0), pair(1)
    assert np.array_equal(dx.read(), x) and np.array_equal(np.array(dx, np.float64), x.astype(np.float64))
    dy[...] = dx
    dx[...] = 0.5
    assert np.array_equal(dy.read(), x) and np.array_equal(dx.read(), np.full(SHAPE, 0.5))
    dx[...] = x[:, :, :1]
    assert np.array_equal(dx.read(), np.broadcast_to(x[:, :, :1], SHAPE))
    numbers, copy = OrtArray("cpu", (4,), "int64"), OrtArray("cpu", (4,), "int64")
    numbers[...] = [1, 2, 3, -(2**40)]
    copy[...] = numbers
    assert copy.read().tolist() == [1, 2, 3, -(2**40)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_copy_keeps_what_is_not_finite(bad: float) -> None:
    values, array = pair()
    values[1, 2, 3, 4] = bad
    array[...] = values
    other = pair()[1]
    other[...] = array
    assert not np.isfinite(other.read()[1, 2, 3, 4]) and np.isfinite(other.read()).sum() == values.size - 1


def test_arrays_refuse_what_they_cannot_do() -> None:
    values, array = pair()
    for wrong in (
        lambda: np.add(array, values, out=array),  # type: ignore[call-overload]
        lambda: array.__setitem__(0, 1.0),
        lambda: array[0],  # type: ignore[index]
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match="cannot be copied into"):
        array[...] = OrtArray("cpu", SHAPE[1:], "float32")
    with pytest.raises(ValueError, match="without a copy"):
        np.array(array, copy=False)


@pytest.mark.parametrize("graph", GRAPHS)
def test_engine_takes_buffers_of_the_device_and_of_numpy(synthetic_bundle: Path, graph: str) -> None:
    bundle = Bundle.open(synthetic_bundle)
    with load(bundle, graph, "onnxruntime", "cpu", threads=1) as host, on_device(bundle, graph) as engine:
        inputs, outputs = buffers(host)
        expected = plain_session(bundle, graph, inputs)
        there = {name: engine.array(array.shape, array.dtype.name) for name, array in (inputs | outputs).items()}
        for name, array in inputs.items():
            there[name][...] = array
        engine.run({name: there[name] for name in inputs}, {name: there[name] for name in outputs})
        engine.run(inputs, outputs)
        for name, wanted in zip(outputs, expected, strict=True):
            for found in (there[name].read(), outputs[name]):
                assert found.dtype == wanted.dtype
                assert np.abs(found.astype(np.float64) - wanted).max() < (2 if found.dtype == np.uint8 else 1e-5)
        step = engine.bind(inputs, outputs)
    with pytest.raises(EngineError, match="closed"):
        step()


def test_engine_checks_buffers_of_the_device(synthetic_bundle: Path) -> None:
    bundle = Bundle.open(synthetic_bundle)
    with on_device(bundle, "text_encoder") as engine:
        dims = {"batch": 1, "text": 9}
        inputs = {name: engine.empty(name, **dims) for name in engine.inputs}
        outputs = {name: engine.empty(name, **dims) for name in engine.outputs}
        with pytest.raises(EngineError, match="text is 9"):
            engine.bind({**inputs, "attention_mask": engine.empty("attention_mask", batch=1, text=8)}, outputs)
        with pytest.raises(EngineError, match="is a list"):
            engine.bind({**inputs, "attention_mask": [1]}, outputs)


def run_twice(
    bundle: Bundle, settings: Settings, kind: type[OnnxRuntimeDeviceEngine] | None, embeds: dict[str, np.ndarray]
) -> tuple[list[np.ndarray], list[dict[tuple[str, int], int]], list[np.ndarray]]:
    """Latents, the steps that the callback heard of, and previews of two runs; on the host where `kind` is None."""
    engines = [
        load(bundle, name, "onnxruntime", "cpu", 1) if kind is None else on_device(bundle, name, kind)
        for name in ("backbone", "flow_head", "update")
    ]
    text = embeds["prompt_embeds"].shape[1]
    backbone, flow_head, update = engines
    loop = family_of(bundle.manifest).loop(backbone, flow_head, update, bundle.manifest, settings.latent_shape, text)
    latents, heard = [], []
    previews: list[np.ndarray] = []
    for _ in range(2):
        steps: list[StepInfo] = []
        timings = Timings(steps.append)
        latents.append(loop.run(settings=settings, timings=timings, on_preview=previews.append, **embeds).latents)
        heard.append({(step.stage, step.total): step.done for step in steps})
        assert timings.seconds["backbone"] > 0 and timings.seconds["flow_head"] > 0
    for engine in engines:
        engine.close()
    return latents, heard, previews


def embeds_for(bundle: Bundle, settings: Settings) -> dict[str, np.ndarray]:
    rng, text = np.random.default_rng(2), bundle.manifest.text
    names = ("prompt_embeds", "negative_embeds")[: settings.passes]
    return {name: rng.normal(size=(1, text.max_length, text.dim)).astype(np.float32) for name in names}


@pytest.mark.parametrize("kind", [OnnxRuntimeDeviceEngine, Recording])
@pytest.mark.parametrize("inner", [1, 2, 4])
def test_loop_on_a_device_gives_the_latents_of_the_host(
    synthetic_bundle: Path, kind: type[OnnxRuntimeDeviceEngine], inner: int
) -> None:
    """In the first run and the second, recorded or step by step."""
    bundle = Bundle.open(synthetic_bundle)
    settings = resolve_settings(bundle.manifest, 5, 3, inner)
    embeds = embeds_for(bundle, settings)
    Recording.launches = 0
    (host, heard, seen), (device, heard_there, seen_there) = (
        run_twice(bundle, settings, each, embeds) for each in (None, kind)
    )
    assert Recording.launches == (5 if kind is Recording else 0)  # of 6 outer steps, all but the first
    for found in (*host, *device):
        assert np.abs(found - host[0]).max() < 1e-5
    assert heard == heard_there == [{("backbone", 3): 3, ("flow_head", 3 * inner): 3 * inner}] * 2
    assert len(seen) == len(seen_there) == 4 and np.abs(np.array(seen) - np.array(seen_there)).max() < 1e-5


@pytest.mark.parametrize("kind", [OnnxRuntimeDeviceEngine, Recording])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("rule", RULES)
def test_velocity_rules_step_on_a_device_as_on_the_host(
    tmp_path: Path, rule: str, guidance: float, kind: type[OnnxRuntimeDeviceEngine]
) -> None:
    sampler = velocity_sampler(rule=rule, guidance=guidance, steps=4)
    bundle = Bundle.open(write_synthetic_bundle(tmp_path / "wan", sampler=sampler))
    settings = resolve_settings(bundle.manifest, 5, frames=5)
    embeds = embeds_for(bundle, settings)
    Recording.launches = 0
    (host, heard, _), (device, heard_there, _) = (run_twice(bundle, settings, each, embeds) for each in (None, kind))
    assert Recording.launches == (7 if kind is Recording else 0)
    for found in (*host, *device):
        assert np.abs(found - host[0]).max() < 1e-5
    total = 4 * settings.passes
    assert heard == heard_there == [{("backbone", total): total, ("flow_head", total): total}] * 2


@pytest.mark.parametrize("kind", [OnnxRuntimeDeviceEngine, Recording])
@pytest.mark.parametrize("pictured", [True, False])
def test_a_first_frame_is_held_on_a_device_as_on_the_host(
    tmp_path: Path, pictured: bool, kind: type[OnnxRuntimeDeviceEngine]
) -> None:
    sampler = velocity_sampler(guidance=3.0, steps=4)
    bundle = Bundle.open(write_synthetic_bundle(tmp_path / "held", sampler=sampler, holds=True))
    settings = resolve_settings(bundle.manifest, 5, frames=9, size=(48, 32))
    given = embeds_for(bundle, settings)
    if pictured:
        given["init"] = np.random.default_rng(4).normal(size=(1, 16, 1, 4, 6)).astype(np.float32)
    Recording.launches = 0
    (host, _, seen), (device, _, seen_there) = (run_twice(bundle, settings, each, given) for each in (None, kind))
    assert Recording.launches == (7 if kind is Recording else 0)
    for found in (*host, *device):
        assert np.abs(found - host[0]).max() < 1e-5
        assert not pictured or np.array_equal(found[:, :, :1], given["init"])
    assert len(seen) == 6 and np.abs(np.array(seen) - np.array(seen_there)).max() < 1e-5


@pytest.mark.parametrize("kind", [OnnxRuntimeDeviceEngine, Recording])
def test_jumps_on_a_device_end_where_those_of_the_host_do(tmp_path: Path, kind: type[OnnxRuntimeDeviceEngine]) -> None:
    """With steps of one row and of two, and fresh noise between them."""
    bundle = Bundle.open(write_tim_bundle(tmp_path / "tim", guidance=3.0))
    settings = resolve_settings(bundle.manifest, 5, 5, rho=0.3)
    embeds = embeds_for(bundle, settings)
    Recording.launches = 0
    (host, _, seen), (device, _, seen_there) = (run_twice(bundle, settings, each, embeds) for each in (None, kind))
    assert Recording.launches == (8 if kind is Recording else 0)  # of 10 steps, all but the first of each row count
    for found in (*host, *device):
        assert np.abs(found - host[0]).max() < 1e-5
    assert len(seen) == len(seen_there) == 8 and np.abs(np.array(seen) - np.array(seen_there)).max() < 1e-5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_on_a_device_names_its_stage(synthetic_bundle: Path, value: float) -> None:
    bundle = Bundle.open(synthetic_bundle)
    settings = resolve_settings(bundle.manifest, 5, 2, 2)
    embeds = embeds_for(bundle, settings)
    embeds["prompt_embeds"][0, 0, 0] = value
    with pytest.raises(RuntimeFailure, match="stage backbone gave NaN or Inf"):
        run_twice(bundle, settings, OnnxRuntimeDeviceEngine, embeds)
