"""What the nodes need of ComfyUI: its folders, its progress bar with previews, and its button that stops a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
import folder_paths

from tmd_runtime import Cancelled
from tmd_runtime.built_in import BUNDLES, PREFIX

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tmd_runtime import StepInfo

FOLDER = "tmd"
"""The folder of bundles in ComfyUI's `models`, and its name in extra_model_paths.yaml."""
_PREVIEW_PIXELS = 512

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def bundles() -> dict[str, Path]:
    """Name -> folder of every bundle that a workflow may name. A workflow comes from anybody, so it names no paths."""
    found = {f"{PREFIX}{path.name}": path for path in sorted(BUNDLES.iterdir()) if path.is_dir()}
    for folder in folder_paths.get_folder_paths(FOLDER):
        for path in sorted(Path(folder).glob("*/manifest.json")):
            found.setdefault(path.parent.name, path.parent)
    return found


class Progress:
    """Shows the steps of one stage in ComfyUI, and stops the run when somebody presses its button."""

    def __init__(self, stage: str, total: int) -> None:
        self._stage, self._bar, self._done, self._total = stage, comfy.utils.ProgressBar(total), 0, total

    def __call__(self, info: StepInfo) -> bool:
        """The callback of a run."""
        if info.stage == self._stage:
            self._done, self._total = info.done, info.total
            self._bar.update_absolute(info.done, info.total)
        return not comfy.model_management.processing_interrupted()

    def preview(self, frames: NDArray[np.uint8]) -> None:
        """Shows the frame in the middle of `frames`, uint8 `[F, H, W, 3]`."""
        from PIL import Image

        picture = Image.fromarray(frames[len(frames) // 2])
        self._bar.update_absolute(self._done, self._total, ("JPEG", picture, _PREVIEW_PIXELS))


@contextmanager
def stoppable() -> Iterator[None]:
    """A run that was stopped ends as ComfyUI's own do."""
    try:
        yield
    except Cancelled:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise


def watched(stage: str, total: int) -> tuple[Progress, Callable[[Any], bool]]:
    """A progress bar, and the callback that moves it."""
    bar = Progress(stage, total)
    return bar, bar.__call__
