"""The rules of the house: imports point one way, and importing or asking for help loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "tmd_ref": ROOT / "tmd_ref",
    "tmd_export": ROOT / "export" / "tmd_export",
    "tmd_engines": ROOT / "engines" / "tmd_engines",
    "tmd_runtime": ROOT / "runtime" / "tmd_runtime",
    "tmd_bench": ROOT / "runtime" / "tmd_bench",
}
ALLOWED = {
    "tmd_ref": set(),
    "tmd_engines": set(),
    "tmd_export": {"tmd_ref", "tmd_engines"},
    "tmd_runtime": {"tmd_engines"},
    "tmd_bench": {"tmd_ref", "tmd_engines", "tmd_export", "tmd_runtime"},  # stands outside and measures
}
HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "av", "transformers", "diffusers")


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_point_one_way(package):
    files = list(FOLDERS[package].rglob("*.py"))
    assert files
    for file in files:
        others = imported(file) & set(FOLDERS) - {package}
        assert others <= ALLOWED[package], f"{file} imports {others - ALLOWED[package]}"


@pytest.mark.parametrize("package", ["tmd_engines", "tmd_runtime"])
def test_the_lean_parts_never_import_torch(package):
    for file in FOLDERS[package].rglob("*.py"):
        assert "torch" not in imported(file), file


def loaded_modules(code: str) -> set[str]:
    path = [str(folder.parent) for folder in FOLDERS.values()]
    code = f"import sys; sys.path[:0] = {path!r}\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("package", FOLDERS)
def test_importing_a_package_loads_no_heavy_library(package):
    assert not loaded_modules(f"import {package}") & set(HEAVY)


@pytest.mark.parametrize(
    "module",
    ["tmd_runtime.command.cli", "tmd_engines.command.cli", "tmd_export.cli", "tmd_ref.distill.cli", "tmd_bench.cli"],
)
def test_asking_a_command_for_help_loads_no_heavy_library(module):
    help_text = f"""
from {module} import main
sys.argv = ["command", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
"""
    assert not loaded_modules(help_text) & set(HEAVY)
