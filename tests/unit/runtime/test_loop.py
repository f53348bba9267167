"""The loop itself, with engines that do nothing: who runs when, on which buffers, and at what cost to the host."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tmd_engines import Bundle
from tmd_runtime.clock import Timings
from tmd_runtime.sampling.schedule import shift_grid
from tmd_runtime.sampling.tmd import DenoiseLoop
from tmd_runtime.settings import resolve_settings


class NullEngine:
    """An engine that only remembers: who ran, with which scalars, reading and writing which y."""

    records = False

    def __init__(self, shapes: dict[str, tuple[int, ...]], log: list[tuple[Any, ...]], name: str) -> None:
        self._shapes, self._log, self._name = shapes, log, name

    def empty(self, name: str, **_: int) -> np.ndarray:
        return np.zeros(self._shapes[name], np.float32)

    def bind(self, inputs: dict[str, Any], outputs: dict[str, Any]) -> Callable[[], None]:
        self._log.append(("bind", self._name))
        if self._name == "backbone":
            return lambda: self._log.append(("backbone", float(inputs["t"][0])))
        return lambda: self._log.append(
            (
                "flow_head",
                float(inputs["s"][0]),
                float(inputs["r"][0]),
                id(inputs["y"]),
                id(outputs["y_next"]),
                id(inputs["noise"]),
            )
        )


def null_loop(bundle: Path, shape: tuple[int, ...]) -> tuple[DenoiseLoop, Any, list[tuple[Any, ...]]]:
    manifest = Bundle.open(bundle).manifest
    latents = dict.fromkeys(("x", "y_next", "noise"), shape)
    others = {
        "t": (1,),
        "s": (1,),
        "r": (1,),
        "prompt_embeds": (1, 4, 64),
        "features": (1, 80, 32),
        "context": (1, 4, 32),
    }
    rope = dict.fromkeys(("rope_cos", "rope_sin"), (shape[2] * shape[3] * shape[4] // 4, 8))
    log: list[tuple[Any, ...]] = []
    engines = [NullEngine({**latents, **others, **rope}, log, name) for name in ("backbone", "flow_head")]
    return DenoiseLoop(*engines, manifest, shape, 4), manifest, log  # type: ignore[arg-type]


def test_loop_binds_once_and_passes_y_back_and_forth(synthetic_bundle: Path) -> None:
    loop, manifest, log = null_loop(synthetic_bundle, (1, 16, 5, 8, 8))
    settings = resolve_settings(manifest, seed=0, steps=2, inner_steps=4)
    for _ in range(2):
        loop.run(np.zeros((1, 4, 64), np.float32), settings, Timings())
    assert [entry[0] for entry in log].count("bind") == 4, "one backbone; y from noise, there and back again"
    runs = [entry for entry in log if entry[0] != "bind"][:10]
    t, s = np.float32(shift_grid(2, 10)), np.float32(shift_grid(4, 10))
    assert [entry[1] for entry in runs if entry[0] == "backbone"] == [t[2], t[1]]
    heads = [entry for entry in runs if entry[0] == "flow_head"]
    assert [entry[1:3] for entry in heads] == [(s[j], s[j - 1]) for j in (4, 3, 2, 1)] * 2
    for transition in (heads[:4], heads[4:]):
        assert transition[0][3] == transition[0][5], "starts from the noise"
        assert all(before[4] == after[3] for before, after in pairwise(transition))
        assert all(step[3] != step[4] for step in transition)


def test_inner_steps_allocate_nothing_of_size(synthetic_bundle: Path) -> None:
    shape = (1, 16, 21, 60, 104)
    loop, _, _ = null_loop(synthetic_bundle, shape)
    timings, s = Timings(), shift_grid(4, 10)
    loop._transition(s, 0, 4, timings)
    tracemalloc.start()
    try:
        loop._transition(s, 0, 4, timings)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000, f"{peak} bytes, and one latent tensor has {4 * np.prod(shape)}"
