"""What a model can be asked for, found by asking: every option is tried on the settings of its family, so that a form
shows what a run will take and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tmd_runtime import UsageFailure
from tmd_runtime.built_in import BUNDLES
from tmd_runtime.sampling import family_of
from tmd_runtime.sampling.schedule import ROPE_POSITIONS
from tmd_runtime.settings import MAX_FPS, MAX_SEED

from .examples import EXAMPLES

if TYPE_CHECKING:
    from tmd_runtime import Pipeline

    from ..settings import Limits

_TRIED = 64


def options_of(pipeline: Pipeline, limits: Limits) -> dict[str, Any]:
    """The options of a bundle's model, for `GET /v1/models`. Loads nothing."""
    manifest = pipeline.manifest
    family, stills = manifest.family, manifest.family.makes_stills
    classes = family.classes(manifest.model)
    label = None if classes is None else 0
    default = pipeline.settings(seed=0, label=label)

    def grants(**wishes: Any) -> bool:
        try:
            pipeline.settings(**{"seed": 0, "label": label, **wishes})
        except UsageFailure:
            return False
        return True

    counts = [count for count in range(1, _TRIED + 1) if grants(steps=count)]
    free = len(counts) == _TRIED
    inner = [count for count in range(1, _TRIED + 1) if grants(inner_steps=count)]
    guided = grants(guidance=2.0)
    pictured = family_of(manifest).takes_picture(manifest) is not None and "encoder" in manifest.graphs
    stride, patch = manifest.latents.spatial_stride, manifest.model.patch_size
    return {
        "family": manifest.model.family,
        "architecture": manifest.model.architecture,
        "kind": "image" if stills else "video",
        "width": _side(default.width, stride * patch[2], limits),
        "height": _side(default.height, stride * patch[1], limits),
        "max_pixels": limits.pixels,
        "frames": {
            "default": default.frames,
            "multiple": manifest.latents.temporal_stride,
            "plus": 1,
            "max": 1 if stills else limits.frames,
        },
        "fps": None if stills else {"default": default.fps, "min": 1, "max": MAX_FPS},
        "steps": {
            "default": default.steps,
            "allowed": None if free else [count for count in counts if count <= limits.steps],
            "max": limits.steps if free else min(counts[-1], limits.steps),
        },
        "inner_steps": None if len(inner) < 2 else {"default": default.inner_steps, "allowed": inner},
        "guidance": {"default": default.guidance, "min": 0.0, "max": 1000.0} if guided else None,
        "negative_prompt": guided and classes is None and grants(guidance=2.0, negative_prompt="blurry"),
        "shift": grants(shift=2.0),
        "schedule": grants(schedule=[1.0, 0.5, 0.0]),
        "deadline": grants(deadline=1.0),
        "rho": grants(rho=0.1),
        "image": pictured,
        "strength": {"default": 0.5, "min": 0.0, "max": 1.0} if pictured and grants(strength=0.5) else None,
        "label": classes is not None,
        "num_classes": classes,
        "preview": True,
        "seed": {"min": 0, "max": MAX_SEED},
        "prompt": {"max_chars": limits.prompt_chars},
        "examples": list(EXAMPLES.get(manifest.model.name, ())) if pipeline.bundle.folder.parent == BUNDLES else [],
    }


def _side(default: int, multiple: int, limits: Limits) -> dict[str, int]:
    """One side of a frame; at most so long that the other one has the least length."""
    most = min(ROPE_POSITIONS * multiple, limits.pixels // multiple)
    return {"default": default, "multiple": multiple, "max": most // multiple * multiple}
