"""A family that nothing in the export has heard of goes through it (tests/helpers/drift_family.py).

And no shared module of the export compares anything with the name of a family or of a rule, or imports a family's own.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import tmd_export
from tests.helpers.drift_family import CHANNELS, Drift, DriftExport, DriftSource, Network
from tmd_engines import Bundle, load
from tmd_engines.bundle.families import FAMILIES as ENGINE_FAMILIES
from tmd_engines.bundle.families.rules import RULES
from tmd_export.families import FAMILIES


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINE_FAMILIES, "drift", Drift())
    monkeypatch.setitem(FAMILIES, "drift", DriftExport())
    monkeypatch.delitem(sys.modules, "tmd_export.cli", raising=False)  # its choices are those of the registry


def test_a_new_family_is_exported_from_the_command_line(registered: None, tmp_path: Path) -> None:
    command = importlib.import_module("tmd_export.cli").command
    arguments = ["--model", "drift-1m", "--random-weights", "3", "--precision", "fp16", "--preset", "drift"]
    result = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "b")], catch_exceptions=False)
    assert result.exit_code == 0, result.output

    bundle = Bundle.open(tmp_path / "b")
    manifest = bundle.manifest
    assert list(manifest.graphs) == ["backbone", "flow_head", "update"]
    assert (manifest.model.family, manifest.family.describe(manifest.sampler)) == ("drift", "euler: 4 steps")
    assert manifest.graphs["backbone"].precision == "fp16" and manifest.video.width == 64
    accuracies = [graph.accuracy for graph in manifest.graphs.values()]
    assert all(found is not None and found.cosine > 0.9999 for found in accuracies)

    network = Network()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.copy_(DriftSource(3).tensor("student", name))
        x, t = torch.randn(2, CHANNELS, 3, 4, 5), torch.tensor([0.2, 0.7])
        expected = network.velocity(network.features(x, t)).numpy()
    dims = {"batch": 2, "frames": 3, "height": 4, "width": 5}
    with load(bundle, "backbone", "onnxruntime") as first, load(bundle, "flow_head", "onnxruntime") as second:
        features, velocity = first.empty("features", **dims), second.empty("velocity", **dims)
        first.run({"x": x.numpy(), "t": t.numpy()}, {"features": features})
        second.run({"features": features}, {"velocity": velocity})
    np.testing.assert_allclose(velocity, expected, rtol=0, atol=1e-2)


def test_a_preset_of_another_family_is_refused_by_its_own_words(registered: None, tmp_path: Path) -> None:
    command = importlib.import_module("tmd_export.cli").command
    arguments = ["--model", "drift-1m", "--random-weights", "0", "--preset", "rcm", "--out", str(tmp_path / "b")]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 1 and "drift-1m is not: choose among drift" in result.stderr


# The rest of the export knows no family.

ROOT = Path(tmd_export.__file__).parent
NAMES = {*FAMILIES, *RULES, "flow_map", "drift"}
OWN = {  # modules of single families
    *(f"{room}/{name}.py" for room in ("families", "presets") for name in FAMILIES),
    *(f"graphs/{name}.py" for name in FAMILIES if name != "anyflow"),  # it has those of wan
    "sources/wan21.py", "sources/wan.py", "sources/experts.py", "sources/folder.py", "sources/random_wan.py",
    "sources/tim.py",
}  # fmt: skip
ALLOWED_IMPORTS = {
    "__init__.py": "offers the sources of the package to programs",
    "families/__init__.py": "the registry",
}


def shared_modules() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        if name not in OWN:
            yield name, ast.parse(file.read_text(encoding="utf-8"))


def compared_names(tree: ast.Module) -> list[str]:
    """Names of families and rules that something is compared with: by an operator, by `match`, or as a key."""
    found = []
    for node in ast.walk(tree):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        elif isinstance(node, ast.Dict):
            sides = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Subscript):
            sides = [node.slice]
        for side in sides:
            parts = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
            found += [part.value for part in parts if isinstance(part, ast.Constant) and part.value in NAMES]
    return found


def own_modules_imported(name: str, tree: ast.Module) -> set[str]:
    """Modules of single families that a shared one imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = (ROOT / name).parents[node.level - 1]
            base = folder.joinpath(*(node.module or "").split("."))
            for path in (base, *(base / alias.name for alias in node.names)):
                if path.is_relative_to(ROOT):
                    found.add(path.relative_to(ROOT).as_posix() + ".py")
    return found & OWN


def test_every_module_of_a_family_is_there() -> None:
    assert all((ROOT / name).is_file() for name in OWN)


def test_shared_modules_compare_nothing_with_the_name_of_a_family_or_rule() -> None:
    found = {name: compared_names(tree) for name, tree in shared_modules()}
    assert len(found) > 40
    assert not {name: names for name, names in found.items() if names}


def test_shared_modules_import_nothing_of_a_single_family() -> None:
    found = {name: own_modules_imported(name, tree) for name, tree in shared_modules()}
    assert {name for name, modules in found.items() if modules} == set(ALLOWED_IMPORTS)


def test_a_comparison_is_found() -> None:
    for code in ("x == 'tim'", "x in ('wan', 'y')", "{'unipc': 1}[x]", "match x:\n case 'tmd': pass"):
        assert compared_names(ast.parse(code)), code
    assert own_modules_imported("export.py", ast.parse("from .sources.tim import TiMSource")) == {"sources/tim.py"}
