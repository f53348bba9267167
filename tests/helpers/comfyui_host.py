"""A stand-in for the parts of ComfyUI that our nodes touch, and a plain way to run a workflow in its API format.

It keeps ComfyUI's contract: inputs by INPUT_TYPES, links by type, outputs by RETURN_TYPES. The nodes have also run in
ComfyUI 0.3.64 itself (integrations/comfyui/README.md).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


class Host:
    """What ComfyUI saw, and its button: `interrupt_after` so many progress updates."""

    def __init__(self, models: Path) -> None:
        self.updates: list[tuple[int, int]] = []
        self.previews: list[Any] = []
        self.interrupt_after: int | None = None
        self.folders: dict[str, list[str]] = {}
        self._models = models

    @property
    def interrupted(self) -> bool:
        return self.interrupt_after is not None and len(self.updates) >= self.interrupt_after

    def modules(self) -> dict[str, ModuleType]:
        """The modules of ComfyUI, by name."""
        host = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                host.updates.append((value, total or self.total))
                if preview is not None:
                    host.previews.append(preview)

        def throw() -> None:
            if self.interrupted:
                self.interrupt_after = None
                raise Interrupted

        comfy, utils, management = (ModuleType(name) for name in ("comfy", "comfy.utils", "comfy.model_management"))
        folders = ModuleType("folder_paths")
        parts: Any = (comfy, utils, management, folders)
        parts[0].utils, parts[0].model_management = utils, management
        parts[1].ProgressBar = ProgressBar
        parts[2].processing_interrupted = lambda: self.interrupted
        parts[2].throw_exception_if_processing_interrupted = throw
        parts[3].models_dir = str(self._models)
        parts[3].add_model_folder_path = lambda name, path: self.folders.setdefault(name, []).append(path)
        parts[3].get_folder_paths = lambda name: self.folders[name]
        return {module.__name__: module for module in parts}


def load_pack(host: Host, name: str = "comfyui_tmd_under_test") -> ModuleType:
    """The node pack, loaded as ComfyUI does it: a folder by its path, with the host's modules around it."""
    sys.modules.update(host.modules())
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def unload_pack(host: Host, name: str = "comfyui_tmd_under_test") -> None:
    for loaded in [found for found in sys.modules if found.partition(".")[0] == name] + list(host.modules()):
        del sys.modules[loaded]


def run_workflow(nodes: dict[str, Any], workflow: dict[str, Any], outside: dict[str, Any]) -> dict[str, tuple]:
    """Node id -> what it gave. `outside` are the outputs of ComfyUI's own nodes, by id."""
    done: dict[str, tuple] = dict(outside)

    def visit(number: str) -> tuple:
        if number not in done:
            node = workflow[number]
            kind = nodes[node["class_type"]]
            inputs = kind.INPUT_TYPES()
            allowed = {**inputs["required"], **inputs.get("optional", {})}
            assert set(inputs["required"]) <= set(node["inputs"]) <= set(allowed), number
            given = {}
            for name, value in node["inputs"].items():
                wanted, *more = allowed[name]
                if isinstance(value, list):
                    source, slot = value
                    if source not in outside:
                        assert nodes[workflow[source]["class_type"]].RETURN_TYPES[slot] == wanted, (number, name)
                    given[name] = visit(source)[slot]
                else:
                    given[name] = checked(value, wanted, more[0] if more else {})
            found = getattr(kind(), kind.FUNCTION)(**given)
            assert isinstance(found, tuple) and len(found) == len(kind.RETURN_TYPES)
            done[number] = found
        return done[number]

    for number, node in workflow.items():
        if node["class_type"] in nodes:
            visit(number)
    return done


def checked(value: Any, wanted: Any, about: dict[str, Any]) -> Any:
    """A value of a widget, as ComfyUI checks it."""
    if isinstance(wanted, list):
        assert value in wanted, f"{value!r} not in list"
        return value
    value = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}[wanted](value)
    assert "min" not in about or about["min"] <= value <= about["max"]
    return value
