"""The loop of TMD with engines that do nothing: who runs when, on which buffers, and at what cost to the host."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tmd_engines import Bundle
from tmd_runtime.clock import Timings
from tmd_runtime.sampling import resolve_settings
from tmd_runtime.sampling.family import LatentShape
from tmd_runtime.sampling.schedule import shift_grid
from tmd_runtime.sampling.tmd import TmdLoop


class NullEngine:
    """An engine that only remembers: who ran, with which scalars, reading and writing which buffers."""

    records = False

    def __init__(self, shapes: dict[str, tuple[int, ...]], log: list[tuple[Any, ...]], name: str) -> None:
        self._shapes, self._log, self._name = shapes, log, name

    def empty(self, name: str, **_: int) -> np.ndarray:
        return np.zeros(self._shapes[name], np.float32)

    def bind(self, inputs: dict[str, Any], outputs: dict[str, Any]) -> Callable[[], None]:
        self._log.append(("bind", self._name))
        scalars = [inputs[name] for name in ("t", "s", "r", "coefficients") if name in inputs]

        def run() -> None:
            values = [tuple(scalar.tolist()) for scalar in scalars]
            self._log.append((self._name, values, {**inputs, **outputs}))

        return run


def null_loop(bundle: Path, shape: LatentShape) -> tuple[TmdLoop, Any, list[tuple[Any, ...]]]:
    manifest = Bundle.open(bundle).manifest
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("x", "y_next", "noise", "x_next", "data"), shape)
    shapes |= {"t": (1,), "s": (1,), "r": (1,), "coefficients": (7,), "magnitude": (1,)}
    shapes |= {"prompt_embeds": (1, 4, 64), "features": (1, 80, 32), "context": (1, 4, 32)}
    shapes |= dict.fromkeys(("rope_cos", "rope_sin"), (shape[2] * shape[3] * shape[4] // 4, 8))
    log: list[tuple[Any, ...]] = []
    engines: list[Any] = [NullEngine(shapes, log, name) for name in ("backbone", "flow_head", "update")]
    backbone, flow_head, update = engines
    return TmdLoop(backbone, flow_head, update, manifest, shape, 4), manifest, log


def test_loop_runs_the_algorithm_on_buffers_that_pass_y_back_and_forth(synthetic_bundle: Path) -> None:
    loop, manifest, log = null_loop(synthetic_bundle, (1, 16, 5, 8, 8))
    settings = resolve_settings(manifest, seed=0, steps=2, inner_steps=4)
    for _ in range(2):
        loop.run(np.zeros((1, 4, 64), np.float32), settings, Timings())
    bound = [entry[1] for entry in log if entry[0] == "bind"]
    assert sorted(bound) == ["backbone", "flow_head", "flow_head", "flow_head", "update"]
    runs = [entry for entry in log if entry[0] != "bind"]
    assert [entry[0] for entry in runs] == ["backbone", *["flow_head"] * 4, "update"] * 4
    t, s = shift_grid(2, 10), shift_grid(4, 10).astype(np.float32)
    for i, outer in ((2, runs[:6]), (1, runs[6:12])):
        (_, times, backbone), *heads, (_, factors, update) = outer
        assert times == [(np.float32(t[i]),)]
        assert [head[1] for head in heads] == [[(s[j],), (s[j - 1],)] for j in (4, 3, 2, 1)]
        buffers = [head[2] for head in heads]
        assert buffers[0]["y"] is buffers[0]["noise"], "starts from the noise"
        assert all(before["y_next"] is after["y"] for before, after in pairwise(buffers))
        assert all(each["y"] is not each["y_next"] for each in buffers)
        assert update["velocity"] is update["negative"] is buffers[-1]["y_next"] and update["x"] is backbone["x"]
        assert factors == [tuple(np.array([1, t[i], 1, t[i - 1] - t[i], 0, 0, 0], np.float32).tolist())]


def test_steps_allocate_nothing_of_size(synthetic_bundle: Path) -> None:
    shape = (1, 16, 21, 60, 104)
    loop, _, log = null_loop(synthetic_bundle, shape)
    s = shift_grid(4, 10)

    def transition() -> None:
        for j in (4, 3, 2, 1):
            loop._inner.step(s, j)()
        loop._updater.set(loop._rule([0.9, 0.0], 0), 0.9)
        loop._update()
        loop._updater.check(loop._bound.features)
        log.clear()

    transition()
    tracemalloc.start()
    try:
        transition()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000, f"{peak} bytes, and one latent tensor has {4 * np.prod(shape)}"
