"""NVIDIA's own Python bindings of TensorRT, loaded without a GPU: over libraries of the right names that do nothing.

The bindings' wheel holds one extension module. It needs three libraries and eight functions of them, which a few lines
of C provide by name; classes, enums and signatures are then the real ones, and whatever needs the library itself fails
as on a machine where TensorRT is broken. `pybind11-stubgen` turns the module into type stubs for mypy.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# Version -> package. JetPack 6 has 10.3; 10.16 is the last of 10.x, with the operators that came in 10.15.
WHEELS = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.16.1.11": "tensorrt-cu13-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
_LIBRARIES = {
    "libnvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "libnvonnxparser": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "libnvinfer_plugin": ("initLibNvInferPlugins",),
}


def prepare(version: str, cache: Path) -> Path:
    """A folder with `tensorrt` (the bindings), `lib` (the libraries) and `stubs` (types), made once and kept.

    Skips the test, saying why, where there is no C compiler or the wheel cannot be downloaded.
    """
    folder = cache / f"{WHEELS[version]}-{version}-{sys.implementation.cache_tag}"
    if (folder / "complete").exists():
        return folder
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to make the libraries of TensorRT's names")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = f"{WHEELS[version]}=={version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-q",
        "-d",
        str(folder),
        wanted,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"pip cannot download {wanted}, so nothing was compared with it: {done.stderr.strip()[-300:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    # What the package `tensorrt` itself does, beside finding its libraries.
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt/__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    _make_libraries(folder / "lib", version.partition(".")[0], compiler)
    _make_stubs(folder, "tensorrt_bindings", ("tensorrt",))
    _make_stubs(folder, "tensorrt_rtx", ("tensorrt_rtx",))
    (folder / "complete").touch()
    return folder


def prepare_rtx(cache: Path) -> Path:
    """The same for TensorRT for RTX, which is installed for real: its types stand for both packages."""
    from importlib.metadata import version

    folder = cache / f"rtx-{version('tensorrt-rtx-cu13')}-{sys.implementation.cache_tag}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _make_stubs(folder, "tensorrt_rtx", ("tensorrt", "tensorrt_rtx"))
        (folder / "complete").touch()
    return folder


def environment(folder: Path, *more: Path) -> dict[str, str]:
    """Environment variables of a process that imports the bindings of `folder`, and packages of `more`."""
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "PYTHONPATH": os.pathsep.join(map(str, (folder, *more))),
    }


def _make_libraries(folder: Path, major: str, compiler: str) -> None:
    folder.mkdir()
    for library, functions in _LIBRARIES.items():
        source = folder / f"{library}.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions))
        name = f"{library}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def _make_stubs(folder: Path, source: str, names: tuple[str, ...]) -> None:
    """Type stubs of the bindings `source`, made fit for mypy, as packages of these names."""
    package = "tensorrt_rtx_bindings.tensorrt_rtx" if source == "tensorrt_rtx" else source
    command = [sys.executable, "-m", "pybind11_stubgen", package, "-o", str(folder / "raw")]
    env = {**environment(folder), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    made = folder / "raw" / package.replace(".", "/")
    files = list(made.glob("*.pyi")) or [made.with_suffix(".pyi")]
    for name in names:
        (folder / "stubs" / name).mkdir(parents=True)
        for path in files:
            text = path.read_text().replace(package, name)
            text = re.sub(r"(?<=[(,] )in: |(?<=\()in: ", "in_: ", text)  # an argument of C++ that is called `in`
            text = re.sub(
                r"(def add_scale_nd\(.*channel_axis: [\w.]+)\)", r"\1 = ...)", text
            )  # after one with a default
            text = re.sub(
                r"(?<=[\[ (|])bool(?=[\]:,) |]|$)(?! as)", "builtins.bool", text, flags=re.M
            )  # trt.bool is in its way
            future = "from __future__ import annotations\n"
            target = "__init__.pyi" if len(files) == 1 else path.name
            text = text.replace(future, f"{future}import builtins\n", 1)
            text += "" if "__version__" in text else "__version__: str\n"  # which the package adds
            (folder / "stubs" / name / target).write_text(text)
