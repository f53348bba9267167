"""How long the host takes per step of the denoising loop, apart from the engines. Not a test: machines differ.

    python benchmarks/host_overhead.py                     # engines that do nothing
    python benchmarks/host_overhead.py --bundle my-bundle  # real engines, whose own time is taken away

Printed are the median and the 10th..90th percentile over the repetitions of
  inner step: setting s and r, choosing buffers, timing, the callback               (gate: 50 µs)
  outer step: one draw of noise, the factors of the update, the copy of x, a check  (grows with the latents)
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import click
import numpy as np

from tmd_runtime.clock import StepInfo, Timings
from tmd_runtime.memory import DENOISER
from tmd_runtime.sampling.calls import Calls
from tmd_runtime.sampling.schedule import shift_grid
from tmd_runtime.sampling.tmd import TmdLoop
from tmd_runtime.settings import Settings

GATE_MICROSECONDS = 50
SHAPES = {"17 x 64 x 64": (1, 16, 5, 8, 8), "81 x 480 x 832": (1, 16, 21, 60, 104)}
OUTER, INNER, TEXT = 2, 4, 32


class NullEngine:
    """Buffers of the right shape, and steps that return at once."""

    records = False

    def __init__(self, latents: tuple[int, ...], dim: int = 128, head_dim: int = 32) -> None:
        tokens = latents[2] * latents[3] * latents[4] // 4
        self._shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("x", "noise", "y_next", "x_next", "data"), latents)
        self._shapes |= dict.fromkeys(("t", "s", "r"), (1,)) | dict.fromkeys(
            ("prompt_embeds", "context"), (1, TEXT, dim)
        )
        self._shapes |= {"coefficients": (7,), "magnitude": (1,), "features": (1, tokens, dim)} | dict.fromkeys(
            ("rope_cos", "rope_sin"), (tokens, head_dim // 2)
        )

    def empty(self, name: str, **_: int) -> np.ndarray:
        return np.zeros(self._shapes[name], np.float32)

    def bind(self, *_: object) -> Callable[[], None]:
        return lambda: None


class TimedEngine:
    """A real engine that adds up the time inside its steps."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.seconds, self.calls = engine, 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def bind(self, inputs: Any, outputs: Any) -> Callable[[], None]:
        step = self._engine.bind(inputs, outputs)

        def timed() -> None:
            start = perf_counter()
            step()
            self.seconds += perf_counter() - start
            self.calls += 1

        return timed


def callback(step: StepInfo) -> bool:
    return True


def measure(loop: TmdLoop, settings: Settings, text_dim: int, repetitions: int, inside: Callable[[], float]) -> str:
    """Microseconds per step of the host alone; `inside` gives the seconds spent in the flow head so far."""
    prompt_embeds = np.zeros((1, TEXT, text_dim), np.float32)
    grid = shift_grid(INNER, 10.0)
    inner, outer = [], []
    for repetition in range(repetitions + 3):
        timings, engines = Timings(callback), inside()
        calls = Calls(timings, flow_head=INNER)
        start = perf_counter()
        loop.run(prompt_embeds, settings, timings)
        whole = perf_counter() - start
        before, start = inside(), perf_counter()
        for j in range(INNER, 0, -1):
            calls("flow_head", loop._inner.step(grid, j))
        transition = perf_counter() - start - (inside() - before)
        if repetition >= 3:
            inner.append(transition / INNER * 1e6)
            outer.append((whole - (before - engines) - OUTER * transition) / OUTER * 1e6)
    return f"inner step {spread(inner)} µs   outer step {spread(outer)} µs"


def spread(values: list[float]) -> str:
    low, middle, high = np.percentile(values, [10, 50, 90])
    return f"{middle:8.1f} ({low:.1f}..{high:.1f})"


def settings_for(shape: tuple[int, int, int, int, int]) -> Settings:
    frames, height, width = (shape[2] - 1) * 4 + 1, shape[3] * 8, shape[4] * 8
    return Settings(0, OUTER, INNER, frames, width, height, 8, 0.0, shape)


@click.command(help=__doc__)
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Measure with the engines of this bundle at its own size."
)
@click.option("--repetitions", default=50, show_default=True)
def main(bundle: Path | None, repetitions: int) -> None:
    print(f"{cpu()}, {platform.system()}, Python {platform.python_version()}, numpy {np.__version__}")
    print(f"{OUTER} outer x {INNER} inner steps, batch 1, with a callback; 3 warm-up runs, {repetitions} repetitions")
    if bundle is None:
        sampler = SimpleNamespace(rule="euler", inner_steps=INNER, shift=10.0, inner_shift=10.0, t_max=0.999)
        manifest: Any = SimpleNamespace(sampler=sampler, model=SimpleNamespace(patch_size=(1, 2, 2), head_dim=32))
        for name, shape in SHAPES.items():
            null: Any = NullEngine(shape)
            loop = TmdLoop(null, null, null, manifest, shape, TEXT)
            print(f"null engines, {name}: {measure(loop, settings_for(shape), 128, repetitions, lambda: 0.0)}")
    else:
        import tmd_runtime
        from tmd_engines import load

        pipeline = tmd_runtime.load(bundle)
        engines: list[Any] = [TimedEngine(load(pipeline.bundle, graph, threads=1)) for graph in DENOISER]
        manifest = pipeline.manifest
        shape = pipeline.settings().latent_shape
        backbone, head, update = engines
        loop = TmdLoop(backbone, head, update, manifest, shape, TEXT)
        result = measure(
            loop, settings_for(shape), manifest.text.dim, repetitions, lambda: sum(each.seconds for each in engines)
        )
        print(f"onnxruntime, 1 thread, {manifest.model.name}: {result}")
        print(f"for comparison, one call of the flow head takes {head.seconds / head.calls * 1e6:.0f} µs (mean)")
    print(f"gate: {GATE_MICROSECONDS} µs per inner step")


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
