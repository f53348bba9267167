"""The rules of the house: imports point one way, and importing or asking for help loads nothing heavy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "tmd_ref": ROOT / "tmd_ref",
    "tmd_export": ROOT / "export" / "tmd_export",
    "tmd_engines": ROOT / "engines" / "tmd_engines",
    "tmd_runtime": ROOT / "runtime" / "tmd_runtime",
    "tmd_bench": ROOT / "runtime" / "tmd_bench",
    "tmd_serve": ROOT / "runtime" / "tmd_serve",
}
# Models are calibrated on what their users will run: the loops and the tokenizer of the runtime.
ALLOWED_ROOMS = {ROOT / "export" / "tmd_export" / "quantization": {"tmd_runtime"}}
ALLOWED: dict[str, set[str]] = {
    "tmd_ref": set(),
    "tmd_engines": set(),
    "tmd_export": {"tmd_ref", "tmd_engines"},
    "tmd_runtime": {"tmd_engines"},
    "tmd_bench": {"tmd_ref", "tmd_engines", "tmd_export", "tmd_runtime"},  # stands outside and measures
    "tmd_serve": {"tmd_engines", "tmd_runtime"},
}
HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "av",
    "transformers",
    "diffusers",
    "fastapi",
)


def imports(file: Path) -> Iterator[str]:
    """Dotted names of what a module imports when it runs; what only types need does not count."""
    package = module_of(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    tree = ast.parse(file.read_text())
    typing = {id(node) for block in ast.walk(tree) if is_typing_only(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (start, node.module)))
            for alias in node.names:
                yield f"{base}.{alias.name}"


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def module_of(file: Path) -> str:
    """Its dotted name; a package has that of its folder."""
    part = next(folder for folder in FOLDERS.values() if folder in file.parents or folder == file.parent)
    inside = file.relative_to(part.parent).with_suffix("")
    return ".".join(inside.parts[:-1] if file.name == "__init__.py" else inside.parts)


def imported(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


def edges(package: str) -> dict[str, set[str]]:
    """Module -> the modules of the same part that it imports. A package's `__init__` that imports lazily is none."""
    files = {module_of(file): file for file in FOLDERS[package].rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        wanted = set()
        for target in imports(file):
            while target and target not in files:
                target = target.rpartition(".")[0]
            if target and target != name and not (files[target].name == "__init__.py" and target == package):
                wanted.add(target)
        found[name] = wanted
    return found


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """A closed walk through the graph, if there is one."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for after in sorted(graph.get(name, ())):
            found = visit(after, [*path, name])
            if found:
                return found
        done.add(name)
        return None

    return next(filter(None, (visit(name, []) for name in sorted(graph))), None)


@pytest.mark.parametrize("package", FOLDERS)
def test_no_module_imports_itself_by_way_of_others(package: str) -> None:
    assert circle(edges(package)) is None


@pytest.mark.parametrize("package", FOLDERS)
def test_rooms_stand_on_one_another(package: str) -> None:
    """Folders form no circle either: each is a floor. A module beside the folders is a room of its own."""

    def room(module: str) -> str:
        inside = module.split(".")[1:]
        return inside[0] if inside else "__init__"

    rooms: dict[str, set[str]] = {}
    for module, targets in edges(package).items():
        rooms.setdefault(room(module), set()).update(room(target) for target in targets)
    assert circle({name: targets - {name} for name, targets in rooms.items()}) is None


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_point_one_way(package: str) -> None:
    files = list(FOLDERS[package].rglob("*.py"))
    assert files
    for file in files:
        others = imported(file) & set(FOLDERS) - {package}
        allowed = ALLOWED[package] | ALLOWED_ROOMS.get(file.parent, set())
        assert others <= allowed, f"{file} imports {others - allowed}"


@pytest.mark.parametrize("package", ["tmd_engines", "tmd_runtime", "tmd_serve"])
def test_the_lean_parts_never_import_torch(package: str) -> None:
    for file in FOLDERS[package].rglob("*.py"):
        assert "torch" not in imported(file), file


def loaded_modules(code: str) -> set[str]:
    path = [str(folder.parent) for folder in FOLDERS.values()]
    code = f"import sys; sys.path[:0] = {path!r}\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("package", FOLDERS)
def test_importing_a_package_loads_no_heavy_library(package: str) -> None:
    assert not loaded_modules(f"import {package}") & set(HEAVY)


@pytest.mark.parametrize(
    "module",
    [
        "tmd_runtime.command.cli",
        "tmd_engines.command.cli",
        "tmd_export.cli",
        "tmd_ref.distill.cli",
        "tmd_bench.cli",
        "tmd_serve.command.cli",
    ],
)
def test_asking_a_command_for_help_loads_no_heavy_library(module: str) -> None:
    help_text = f"""
from {module} import main
sys.argv = ["command", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
"""
    assert not loaded_modules(help_text) & set(HEAVY)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("tmd_runtime.command.cli", "tmd-run"),
        ("tmd_engines.command.cli", "tmd-engine"),
        ("tmd_export.cli", "tmd-export"),
        ("tmd_ref.distill.cli", "tmd-distill"),
        ("tmd_bench.cli", "tmd-bench"),
        ("tmd_serve.command.cli", "tmd-serve"),
    ],
)
def test_every_command_prints_its_version(module: str, name: str) -> None:
    run = f"import sys\nfrom {module} import main\nsys.argv = ['{name}', '--version']\nmain()"
    path = os.pathsep.join(str(folder.parent) for folder in FOLDERS.values())
    done = subprocess.run(
        [sys.executable, "-c", run], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout == f"{name} {version('tmd-runtime')}\n", done.stderr
