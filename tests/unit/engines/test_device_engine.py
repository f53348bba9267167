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
from tests.helpers.synthetic import GRAPHS
from tmd_engines import Bundle, EngineError, load
from tmd_engines.onnxruntime.gpu_engine import OnnxRuntimeDeviceEngine, OrtArray
from tmd_runtime.clock import StepInfo, Timings
from tmd_runtime.sampling.noise import NoiseStream
from tmd_runtime.sampling.rules import RULES
from tmd_runtime.sampling.tmd import DenoiseLoop
from tmd_runtime.settings import resolve_settings

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


def test_arrays_compute_what_numpy_computes_to_the_last_bit() -> None:
    (x, dx), (y, dy) = pair(0), pair(1)
    for numbers in ((x, y), (dx, dy)):
        a, b = numbers
        np.multiply(b, np.float32(0.3), out=b)
        np.multiply(0.7, a, out=a)
        np.subtract(a, b, out=a)
        np.add(b, a, out=b)
        np.subtract(b, b, out=b)
        np.add(a, a, out=b)
    assert np.array_equal(dx.read(), x) and np.array_equal(dy.read(), y)
    assert (
        np.array_equal(np.asarray(dx), x)
        and np.array_equal(dx[0, 1], x[0, 1])
        and dx.astype(np.float64).dtype.itemsize == 8
    )
    assert abs(float(np.sum(dx, dtype=np.float64)) - x.sum(dtype=np.float64)) < 1e-3
    dy[...] = dx
    assert np.array_equal(dy.read(), x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sum_shows_what_is_not_finite(bad: float) -> None:
    values, array = pair()
    values[1, 2, 3, 4] = bad
    array[...] = values
    assert not np.isfinite(np.sum(array, dtype=np.float64))


def test_arrays_refuse_what_they_cannot_do() -> None:
    values, array = pair()
    for wrong in (
        lambda: np.multiply(array, array, out=array),
        lambda: np.exp(array),
        lambda: np.add(array, values, out=array),
        lambda: np.multiply(array, 2.0),
        lambda: array.__setitem__(0, 1.0),
    ):
        with pytest.raises(TypeError):
            wrong()


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


@pytest.mark.parametrize("kind", [OnnxRuntimeDeviceEngine, Recording])
@pytest.mark.parametrize("inner", [1, 4])
def test_loop_on_a_device_gives_the_latents_of_the_host(
    synthetic_bundle: Path, kind: type[OnnxRuntimeDeviceEngine], inner: int
) -> None:
    """In the first run and the second, recorded or step by step."""
    bundle = Bundle.open(synthetic_bundle)
    settings = resolve_settings(bundle.manifest, 5, 3, inner, None, None, None, None, None)
    embeds = np.random.default_rng(2).normal(size=(1, bundle.manifest.text.max_length, bundle.manifest.text.dim))
    latents, told = [], []
    Recording.launches = 0
    for device in (False, True):
        engines = [
            on_device(bundle, name, kind) if device else load(bundle, name, "onnxruntime", "cpu", 1)
            for name in ("backbone", "flow_head")
        ]
        loop = DenoiseLoop(*engines, bundle.manifest, settings.latent_shape, embeds.shape[1])
        for _ in range(2):
            steps: list[StepInfo] = []
            timings = Timings(lambda step, steps=steps: steps.append(step))
            latents.append(loop.run(embeds.astype(np.float32), settings, timings))
            told.append({(step.stage, step.total): step.done for step in steps})
            assert timings.seconds["backbone"] > 0 and timings.seconds["flow_head"] > 0
        for engine in engines:
            engine.close()
    assert Recording.launches == (5 if kind is Recording else 0)  # of 6 outer steps, all but the first
    for found, steps_told in zip(latents, told, strict=True):
        assert np.abs(found - latents[0]).max() < 1e-5
        assert steps_told == {("backbone", 3): 3, ("flow_head", 3 * inner): 3 * inner}


@pytest.mark.parametrize("rule", RULES)
def test_rules_step_on_a_device_as_on_the_host(rule: str) -> None:
    times = (0.9, 0.6, 0.3, 0.0)
    results = []
    for empty in (lambda: np.empty(SHAPE, np.float32), lambda: OrtArray("cpu", SHAPE, "float32")):
        x, v = empty(), empty()
        made = RULES[rule](SHAPE, empty)
        made.start(times, NoiseStream(3))
        x[...] = pair(0)[0]
        for i in range(3):
            v[...] = pair(i + 1)[0]
            made.step(i, x, v)
        results.append(np.asarray(x).copy())
    assert np.array_equal(*results)
