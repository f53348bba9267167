"""What each layer does to a quantized graph's result, against the plain way to measure it, and which layers stay."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.export_tools import small_export, small_source, with_weights
from tests.helpers.quantized_tools import export_small
from tmd_export.families.tmd import TMD
from tmd_export.quantization import quantizer, sensitivity
from tmd_export.quantization.calibration import FILE, read_calibration
from tmd_export.quantization.contributions import Contributions
from tmd_export.quantization.observe import Observed
from tmd_export.quantization.passes import Pass, stacked
from tmd_export.quantization.rounded import Rounded
from tmd_export.quantization.samplings import Condition, Samplings

SIZES = {"batch": 2, "frames": 2, "height": 4, "width": 6, "text": 8}


def relative(found: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray]) -> float:
    """L2 error of all outputs together."""
    squares = (float(np.square(found[name] - exact[name]).sum()) for name in exact)
    return float((sum(squares) / sum(float(np.square(value).sum()) for value in exact.values())) ** 0.5)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("part", ["backbone", "flow_head"])
def test_the_part_of_a_layer_in_the_error_is_what_it_does_alone(part: str, precision: str) -> None:
    """Measured at once, against one pass per layer, the plain way."""
    inputs = {
        name: value.numpy() for name, value in with_weights(small_source(), part).random_inputs(3, **SIZES).items()
    }
    observed = Observed(small_export().bundle, part, TMD.products)
    exact = observed(inputs)
    path = small_export().bundle.graph_path(part)
    with closing(Rounded(path, precision, observed.ranges, TMD.products)) as rounded:
        together = relative(rounded(inputs), exact)
        alone = {layer: relative(rounded(inputs, set(rounded.layers) - {layer}), exact) for layer in rounded.layers}
        found = Contributions(rounded)([(inputs, exact)])
    assert not list(path.parent.glob("*.data.*"))
    assert sum(part**2 for part in found.values()) ** 0.5 == pytest.approx(together, rel=1e-3)
    assert found.keys() == alone.keys()
    for layer, error in alone.items():
        assert 0.7 < found[layer] / error < 1.4, layer
    three = [set(sorted(table, key=table.__getitem__)[-3:]) for table in (found, alone)]
    assert len(three[0] & three[1]) >= 2


def choose(errors: Mapping[str, float], parts: Mapping[str, float] | None, always: bool = True) -> Any:
    """`measure` on four layers whose errors add up by their squares, with the table `parts`; and how many trials."""
    expected = {"y": np.eye(4, dtype=np.float32)}
    trials: list[Collection[str]] = []

    def compute(_: Any, kept: Collection[str]) -> dict[str, np.ndarray]:
        trials.append(kept)
        factors = np.array([1 + errors[name] * (name not in kept) for name in errors], np.float32)
        return {"y": np.diag(factors)}

    passes = [Pass({}, expected)]
    return sensitivity.measure(compute, passes, None if parts is None else lambda: parts, always), len(trials)


def test_the_worst_layers_are_kept_until_the_rest_is_good_enough() -> None:
    errors = {"a": 0.03, "b": 0.3, "c": 0.04, "d": 0.1}
    table = {name: error / 2 for name, error in errors.items()}
    found, _ = choose(errors, table)
    assert found.layers == table
    assert found.kept == ("b", "d")  # without b alone, sqrt(0.03² + 0.04² + 0.1²) / 2 = 0.056 would be left
    assert found.everything > sensitivity.GOAL >= found.chosen
    for factor in (0.1, 10.0):  # the order is what counts, and the trials correct the rest
        found, _ = choose(errors, {name: factor * error for name, error in table.items()})
        assert found.kept == ("b", "d")
    unmeasured, trials = choose({name: error / 10 for name, error in errors.items()}, table, always=False)
    assert not unmeasured.layers and not unmeasured.kept and trials == 1
    unmeasured, trials = choose(errors, None)
    assert not unmeasured.layers and not unmeasured.kept and trials == 1
    assert unmeasured.chosen == found.everything > sensitivity.GOAL


@pytest.mark.parametrize("where", ["in the same run", "in a run of its own", "of another number of steps"])
def test_no_call_is_left_behind_by_a_small_error_of_all_together(where: str) -> None:
    """The layer b turns the result of one call, which is small beside the others'."""
    large, small = np.full((1, 4), 100, np.float32), np.ones((1, 4), np.float32)
    turned = np.array([[1.2, 0.8, 1.2, 0.8]], np.float32)

    def compute(inputs: Mapping[str, np.ndarray], kept: Collection[str]) -> dict[str, np.ndarray]:
        y = inputs["y"] * (1 if "a" in kept else 1.001)
        return {"y": y if "b" in kept else np.where(np.abs(y) < 2, y * turned, y)}

    if where == "in the same run":
        both = {"y": np.concatenate((large, small))}
        passes, others = [Pass(both, both, 2)], []
    else:
        passes, others = [Pass({"y": large}, {"y": large})], [Pass({"y": small}, {"y": small})]
        if where == "in a run of its own":
            passes, others = passes + others, []
    table = {"a": 0.001, "b": 0.002}
    found = sensitivity.measure(compute, passes, lambda: table, others=others)
    assert found.kept == ("b",) and found.everything < 0.01


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_few_trials_find_the_fewest_layers_to_keep(seed: int, precise: bool) -> None:
    rng = np.random.default_rng(seed)
    parts = np.sort(np.exp(rng.normal(-5.0, 1.0, 300)))[::-1]
    left = np.sqrt(np.concatenate((np.cumsum(parts[::-1] ** 2)[::-1], [0.0])))  # by how many are kept
    table = parts * np.exp(rng.normal(0.0, 0.3, 300))
    order = np.argsort(-table)
    trials = []

    def error(count: int) -> float:
        trials.append(count)
        return float(np.sqrt(np.square(parts[order[count:]]).sum()))

    goal = left[0] / 2
    search = sensitivity._Search(table[order].tolist(), error(0), goal, 0.0 if precise else sensitivity.SLACK)
    count, found = search(error)
    assert found == error(count) <= goal
    assert error(count - 1) > goal if precise else found >= (1 - sensitivity.SLACK) * goal
    assert len(trials) <= (14 if precise else 6)
    assert count <= 1.5 * int(np.argmax(left <= goal)) + 1  # against the true order


@pytest.mark.slow
def test_a_large_model_is_calibrated_on_few_samplings_and_has_a_table_if_it_needs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "LARGE_BYTES", 0)
    runs: list[tuple[int, ...]] = []
    run = Samplings.run

    def counted(samplings: Samplings, condition: Condition, seed: int, *counts: int) -> np.ndarray:
        runs.append(counts)
        return run(samplings, condition, seed, *counts)

    monkeypatch.setattr(Samplings, "run", counted)
    bundle = export_small(tmp_path / "all", parts=("backbone",), precision="fp8").bundle
    assert runs == [(4, 4), (1, 1), (1, 2), (2, 2)]  # to calibrate on, and to compare on
    found = read_calibration(bundle.folder / FILE)
    assert found.steps == ((4, 4), (1, 1)) and not found.sensitivity["fp8"]["backbone"].layers
    accuracy = bundle.manifest.graphs["backbone"].accuracy
    assert (
        accuracy is not None and "on 3 passes of samplings; relative L2 by number of steps: 1: " in accuracy.reference
    )

    goal = 0.6 * found.sensitivity["fp8"]["backbone"].everything

    def within(compute: Any, passes: Any, table: Any, always: bool, **_: Any) -> Any:
        return sensitivity.measure(compute, passes, table, always, goal)

    monkeypatch.setattr(quantizer, "measure", within)
    runs.clear()
    some = export_small(tmp_path / "some", parts=("backbone",), precision="fp8", calibration=["one", "two", "three"])
    assert runs == [(4, 4), (1, 1), (4, 4), (1, 2), (2, 2)]
    table = read_calibration(some.bundle.folder / FILE).sensitivity["fp8"]["backbone"]
    assert table.chosen <= goal < table.everything
    assert table.kept == tuple(sorted(table.layers, key=table.layers.__getitem__)[: -1 - len(table.kept) : -1])


def test_passes_of_the_same_sizes_run_together() -> None:
    info = small_export().bundle.graph_info("backbone")
    graph = with_weights(small_source(), "backbone")
    observed = Observed(small_export().bundle, "backbone", TMD.products)
    rope: dict[str, np.ndarray] = {}
    passes = []
    for seed, text in ((1, 8), (2, 8), (3, 5), (4, 8), (5, 8)):
        given = {name: value.numpy() for name, value in graph.random_inputs(seed, **{**SIZES, "text": text}).items()}
        rope = rope or {name: value for name, value in given.items() if name.startswith("rope")}
        passes.append(Pass({**given, **rope}, observed({**given, **rope})))
    together = stacked(info.inputs, info.outputs, passes, most=2)
    assert [each.calls for each in together] == [2, 1, 2]
    assert [each.calls for each in stacked(info.inputs, info.outputs, passes[3:] * 3, most=4)] == [4, 2]
    assert together[0].inputs["x"].shape[0] == 2 * SIZES["batch"] and together[0].inputs["rope_cos"].ndim == 2
    for each in together:
        for name, value in observed(each.inputs).items():
            assert np.abs(value - each.outputs[name]).max() < 1e-5
    turned = {**passes[1].inputs, "rope_cos": -passes[1].inputs["rope_cos"]}
    others = [passes[0], Pass(turned, passes[1].outputs)]
    assert [each.calls for each in stacked(info.inputs, info.outputs, others)] == [1, 1]
