"""Writes C++ classes that implement what TensorRT's headers declare, every function by ending the process.

    python make_tensorrt_stubs.py FOLDER_OF_THE_HEADERS OUT.inc

For tests/fake_tensorrt.cpp, which overrides the few functions that it stands in for. The headers are NVIDIA's, of
TensorRT or of TensorRT for RTX, differ between versions and are not part of this repository, so what is made of them is
not either: it is made when the tests are built.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CLASSES = {"VRuntime": "StubRuntime", "VCudaEngine": "StubEngine", "VExecutionContext": "StubContext"}
FOR_RTX = {"VRuntimeConfig": "StubConfig", "VRuntimeCache": "StubCache", "VHostMemory": "StubMemory"}
"""What only the headers of TensorRT for RTX have, or what its stand-in needs beside the others."""
FEWEST = {"VRuntimeConfig": 5, "VRuntimeCache": 3, "VHostMemory": 3}


def pure_functions(header: str, name: str) -> list[str]:
    """The declarations of the pure virtual functions of a class, without `virtual` and `= 0`."""
    (body,) = re.findall(rf"class {name}\b[^;{{]*\{{(.*?)\n\}};", header, re.DOTALL)
    declarations = re.findall(r"virtual\s([^;]*?)=\s*0\s*;", body)
    return [" ".join(declaration.split()) for declaration in declarations]


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    header = re.sub(r"//[^\n]*|/\*.*?\*/", "", (folder / "NvInferImpl.h").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = []
    for name, stub in {**CLASSES, **(FOR_RTX if "class VRuntimeCache " in header else {})}.items():
        functions = pure_functions(header, name)
        if len(functions) < FEWEST.get(name, 20):
            sys.exit(f"{name} has {len(functions)} functions in {folder}: these are not the headers that were expected")
        lines += [f"class {stub} : public nvinfer1::apiv::{name} {{", " public:"]
        lines += [f"  {function} override {{ std::abort(); }}" for function in functions]
        lines += ["};", ""]
    out.write_text("namespace nvinfer1 {\n" + "\n".join(lines) + "}  // namespace nvinfer1\n", encoding="utf-8")


if __name__ == "__main__":
    main()
