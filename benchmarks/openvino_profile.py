"""Where the time of a graph goes on OpenVINO, by kind of node and kernel. Not a test: machines differ.

    python benchmarks/openvino_profile.py my-bundle --graph backbone --size 256x256 --frames 17

OpenVINO counts real time per node, so on a shared machine only the shares mean something, and the processor time.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from time import process_time
from typing import Any

import click
import numpy as np

from tmd_engines import Bundle
from tmd_engines.command.options import Size
from tmd_engines.cost.sizing import graph_sizes
from tmd_engines.openvino.engine import OpenVinoEngine

_DECODERS = ("decoder_first", "decoder_step")


def profile(bundle: Bundle, graph: str, sizes: dict[str, int], runs: int) -> tuple[float, Counter[str], Counter[str]]:
    """Processor seconds of a run; its real seconds and number of nodes, by "kind, kernel". Means after a first run."""
    with OpenVinoEngine(bundle, graph, "cpu", 1) as entered:
        engine: Any = entered  # OpenVINO's own, of which more is looked at than every engine has
        engine._properties["PERF_COUNT"] = "YES"
        inputs = _values({name: engine.empty(name, **sizes) for name in engine.inputs})
        step = engine.bind(inputs, {name: engine.empty(name, **sizes) for name in engine.outputs})
        time: Counter[str] = Counter()
        count: Counter[str] = Counter()
        step()
        cpu = 0.0
        for _ in range(runs):
            start = process_time()
            step()
            cpu += (process_time() - start) / runs
            for node in step._request.profiling_info:
                if node.real_time.total_seconds():
                    name = f"{node.node_type}, {node.exec_type}"
                    time[name] += node.real_time.total_seconds() / runs
                    count[name] += 1
    return cpu, time, count


def _values(buffers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    for name, array in buffers.items():
        array[...] = 0.5 if name in ("t", "s", "r") else rng.standard_normal(array.shape, np.float32)
    if "rope_cos" in buffers:
        angle = rng.uniform(0, 2 * np.pi, buffers["rope_cos"].shape)
        buffers["rope_cos"][...], buffers["rope_sin"][...] = np.cos(angle), np.sin(angle)
    return buffers


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--graph", type=click.Choice(("backbone", "flow_head", *_DECODERS)), default="backbone", show_default=True
)
@click.option("--size", type=Size(), default="256x256", show_default=True)
@click.option("--frames", type=int, default=17, show_default=True)
@click.option("--runs", type=int, default=1, show_default=True)
def main(folder: Path, graph: str, size: tuple[int, int], frames: int, runs: int) -> None:
    bundle = Bundle.open(folder)
    cpu, time, count = profile(bundle, graph, graph_sizes(bundle.manifest, *size, frames), runs)
    total = sum(time.values())
    print(f"{graph}, {bundle.graph_info(graph).precision}: {cpu:.2f} s of the processor, {total:.2f} s in nodes")
    for name, each in time.most_common(16):
        print(f"{100 * each / total:5.1f} %  {count[name] // runs:4d} x  {name}")


if __name__ == "__main__":
    main()
