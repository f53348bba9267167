"""Checkpoints without inner flow: Wan2.1 and Wan2.2 themselves, and few-step models distilled from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import ExportError
from . import Preset

WAN21, WAN22, A14B = "wan2.1-t2v", "wan2.2-ti2v", "wan2.2-t2v-a14b"
"""What the manifest's `model.architecture` is."""

# wan/configs/shared_config.py of Wan2.1 and Wan2.2: what the teacher is steered away from (garish, static, ...).
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
VIDEO_480P: Mapping[str, int] = {"frames": 81, "width": 832, "height": 480, "fps": 16}
VIDEO_720P: Mapping[str, int] = {**VIDEO_480P, "width": 1280, "height": 720}
VIDEO_5B: Mapping[str, int] = {"frames": 121, "width": 1280, "height": 704, "fps": 24}
RCM_SIGMA_MAX = 80.0
DMD_STEPS = [1000, 757, 522]


def _velocity(rule: str, steps: int, *, times: list[float] | None = None, **others: Any) -> dict[str, Any]:
    """A `sampler` of family "wan": one pass, exact times, noise as drawn, and as many steps as times unless said."""
    return {
        "rule": rule,
        "steps": steps,
        "allowed_steps": [steps],
        "shift": 1.0,
        "times": times,
        "time_rounding": "none",
        "init_scale": 1.0,
        "guidance": 1.0,
        "negative_prompt": None,
        **others,
    }


def _warped(times: list[float], shift: float) -> list[float]:
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def _looked_up(listed: list[int], shift: float) -> list[float]:
    """The times nearest to `listed`/1000 in a table of 1000 warped ones: what steps by such a list go through."""
    table = _warped([k / 1000 for k in range(1, 1001)], shift)
    return [min(table, key=lambda t: abs(1000 * t - thousandths)) for thousandths in listed]


def _rcm_times() -> list[float]:
    """TrigFlow angles as rectified-flow times sin/(sin + cos); the first angle belongs to sigma_max."""
    angles = (math.atan(RCM_SIGMA_MAX), 1.5, 1.4, 1.0)
    return [math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles]


_WAN21: Mapping[str, Preset] = {
    # Wan2.1, generate.py and README: 50 steps of UniPC, whole time steps. The shift is that of 480p; 5 suits 720p.
    "wan": Preset(
        "Wan2.1 itself, 50 steps with guidance",
        _velocity(
            "unipc",
            50,
            allowed_steps=None,
            shift=3.0,
            time_rounding="integer",
            guidance=5.0,
            negative_prompt=WAN_NEGATIVE_PROMPT,
        ),
        VIDEO_480P,
    ),
    # NVlabs/rcm, wan2pt1_t2v_rcm_infer.py: the first noise is scaled by the first time; the network gets times in bf16.
    "rcm": Preset(
        "rCM, 1 to 4 steps, 77 frames",
        _velocity(
            "renoise",
            4,
            times=_rcm_times(),
            allowed_steps=[1, 2, 3, 4],
            time_rounding="bfloat16",
            init_scale=_rcm_times()[0],
        ),
        {**VIDEO_480P, "frames": 77},
    ),
    # ModelTC/LightX2V, schedulers/wan/step_distill: deterministic although trained with fresh noise.
    "lightx2v": Preset(
        "LightX2V step distillation, 4 steps",
        _velocity("euler", 4, times=_warped([1.0, 0.75, 0.5, 0.25], 5.0), shift=5.0),
        VIDEO_480P,
    ),
    # hao-ai-lab/FastVideo, DmdDenoisingStage: the network gets whole numbers, the steps what the table has for them.
    "fastwan-qad": Preset(
        "FastWan-QAD, 3 steps",
        _velocity("renoise", 3, times=_looked_up(DMD_STEPS, 8.0), shift=8.0, time_rounding="nearest"),
        VIDEO_480P,
    ),
    # hao-ai-lab/FastVideo, mlx_runtime/fastwan.py (FastMetal's 1.3B and 14B): the same list, table and shift.
    "fastmetal": Preset(
        "FastMetal, 3 steps, 77 frames",
        _velocity("renoise", 3, times=_looked_up(DMD_STEPS, 8.0), shift=8.0, time_rounding="nearest"),
        {**VIDEO_480P, "frames": 77, "height": 448},
    ),
    # tianweiy/CausVid, bidirectional_inference.py and configs/wan_bidirectional_dmd.yaml: the same list and table.
    "causvid": Preset(
        "CausVid, the bidirectional checkpoints, 3 steps",
        _velocity("renoise", 3, times=_looked_up(DMD_STEPS, 8.0), shift=8.0, time_rounding="nearest"),
        VIDEO_480P,
    ),
    # JIA-Lab-research/CoDMD, bidirectional_inference.py, wan_wrapper.py, configs/wan_dmd_tar.yaml: the same table, of
    # shift 8 whatever the configuration says, and fresh noise.
    "codmd": Preset(
        "CoDMD of Wan2.1 1.3B, 4 steps",
        _velocity("renoise", 4, times=_looked_up([1000, 900, 757, 522], 8.0), shift=8.0, time_rounding="nearest"),
        VIDEO_480P,
    ),
    # The same, with the list of configs/wan_dmd_tar_14b.yaml.
    "codmd-14b": Preset(
        "CoDMD of Wan2.1 14B, 4 steps",
        _velocity("renoise", 4, times=_looked_up([1000, 937, 833, 624], 8.0), shift=8.0, time_rounding="nearest"),
        VIDEO_480P,
    ),
    # lightx2v's file for 1.3B says nothing of its sampling, and LightX2V has no configuration for it. This is how
    # THU-MIG/edge-dit.cpp runs it (benchmark/models/wan21-t2v-1.3b-distill.yaml, wan_pipeline.cpp): Euler without
    # guidance through 8 equispaced times from 1 to 0.001, warped by 3. (One page of its docs has a shift of 5.)
    "lightx2v-1.3b": Preset(
        "LightX2V step distillation of Wan2.1 1.3B, 8 steps as edge-dit.cpp runs it",
        _velocity("euler", 8, times=_warped([1 - 0.999 * k / 7 for k in range(8)], 3.0), shift=3.0),
        VIDEO_480P,
    ),
    # aejion/AccVideo, README for WanXT2V: UniPC, 10 steps on Wan's grid with its default shift, without guidance.
    "accvideo": Preset(
        "AccVideo-WanX, 10 steps",
        _velocity("unipc", 10, shift=5.0, time_rounding="integer"),
        VIDEO_480P,
    ),
}


# Made for Wan2.2's latents: any other model shows noise in them.
_WAN22: Mapping[str, Preset] = {
    # Wan2.2, wan/configs/wan_ti2v_5B.py and textimage2video.py: the sampler of Wan2.1 with its own shift and output.
    "wan2.2-ti2v": Preset(
        "Wan2.2-TI2V-5B itself, 50 steps with guidance",
        {**_WAN21["wan"].sampler, "shift": 5.0},
        VIDEO_5B,
    ),
    # hao-ai-lab/FastVideo, DmdDenoisingStage: its table has shift 8 whatever the model's configuration says (5). The
    # configured shift is what mlx_runtime/fastwan.py uses for FastMetal-5B; its times are within 0.0005 of these.
    "fastwan2.2": Preset(
        "FastWan2.2-TI2V-5B and FastMetal-5B, 3 steps",
        _velocity("renoise", 3, times=_looked_up(DMD_STEPS, 8.0), shift=8.0, time_rounding="nearest"),
        VIDEO_5B,
    ),
    # quanhaol/Wan2.2-TI2V-5B-Turbo, pipeline/wan22_fewstep_inference.py: the network gets whole numbers, the steps what
    # a table of shift 8 has for them. (It was trained at other times, which its inference does not use: the same list
    # warped with shift 5.)
    "wan2.2-turbo": Preset(
        "Wan2.2-TI2V-5B-Turbo, 4 steps",
        _velocity("renoise", 4, times=_looked_up([1000, 750, 500, 250], 8.0), shift=8.0, time_rounding="nearest"),
        VIDEO_5B,
    ),
}


def _of_experts(base: Mapping[str, Any], shift: float) -> dict[str, Any]:
    """40 steps, more guidance in high noise than in low (Wan2.2, wan/configs/wan_t2v_A14B.py)."""
    return {**base, "steps": 40, "shift": shift, "guidance": 4.0, "guidance_2": 3.0}


# For two transformers with a boundary; that of the checkpoint takes the place of this one.
_A14B: Mapping[str, Preset] = {
    # Wan2.2, wan/configs/wan_t2v_A14B.py.
    "wan2.2-a14b": Preset(
        "Wan2.2-A14B itself, 40 steps with guidance",
        {**_of_experts(_WAN21["wan"].sampler, 12.0), "boundary": 0.875},
        VIDEO_720P,
    ),
    # ModelTC/Wan2.2-Lightning, README and issue 3: the same times, and no guidance; two of them are high noise.
    "lightning": Preset(
        "Wan2.2-Lightning, 4 steps (LoRAs for both transformers of Wan2.2-A14B)",
        _velocity("euler", 4, times=_warped([1.0, 0.75, 0.5, 0.25], 5.0), shift=5.0),
        VIDEO_720P,
    ),
}

PRESETS: Mapping[str, Preset] = {
    **{name: replace(preset, architecture=WAN21) for name, preset in _WAN21.items()},
    **{name: replace(preset, architecture=WAN22) for name, preset in _WAN22.items()},
    **{name: replace(preset, architecture=A14B) for name, preset in _A14B.items()},
}


def distilled_preset(architecture: str) -> Preset:
    """How FastVideo samples its few-step models of an architecture."""
    return PRESETS["fastwan2.2" if architecture == WAN22 else "fastwan-qad"]


def scheduled_sampler(rule: str, shift: float | None, architecture: str = WAN21) -> dict[str, Any]:
    """The manifest's `sampler` of a model without distillation with another update rule, and with another shift unless
    it is None."""
    base = next(preset.sampler for preset in PRESETS.values() if preset.architecture == architecture)
    rounding = base["time_rounding"] if rule == base["rule"] else "none"
    return {**base, "rule": rule, "shift": base["shift"] if shift is None else shift, "time_rounding": rounding}


def experts_sampler(scheduled: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's `sampler` of Wan2.2-A14B but for its boundary, with rule, shift and rounding as the scheduler of
    its folder says."""
    return _of_experts(scheduled, scheduled["shift"])


def on_grid(rule: str, grid: str) -> str:
    """The manifest's name of the time grid that the project `grid` has for `rule`. Raises ExportError for none."""
    if grid == "wan":
        return grid
    names = {"unipc": "diffusers-unipc", "euler": "diffusers-euler"}
    if rule not in names:
        raise ExportError(f"--grid {grid} is for the rules {', '.join(names)}, and this model steps by {rule}.")
    return names[rule]
