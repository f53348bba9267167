"""How a folder in diffusers' layout says that its model is sampled: `scheduler/scheduler_config.json`.

Followed are the update rule of the class and its shift. What the classes do beyond flow matching is not computed here,
and a configuration that asks for it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmd_engines.errors import quote

from ..errors import ExportError
from .contents import MODEL_INDEX
from .documents import read_document

DMD = "WanDMDPipeline"
"""The pipeline that FastVideo's few-step models name. It ignores the scheduler of their folder."""

CONFIG = Path("scheduler", "scheduler_config.json")
_MAX_BYTES = 1 << 20
_CHOOSE = "Choose how to sample it with --preset."


@dataclass(frozen=True)
class Scheduler:
    """Update `rule` and `shift` (None: the configuration has none) of the class `called`, and whether it is for flow
    maps, which are told two times."""

    called: str
    rule: str
    shift: float | None
    flow_map: bool = False

    def __str__(self) -> str:
        return self.called + ("" if self.shift is None else f", shift {self.shift:g}")


@dataclass(frozen=True)
class _Class:
    """A class of diffusers: its rule here, the entry that is its shift, and what other entries must be if they are
    there, since anything else means other arithmetic."""

    rule: str
    shift: str
    must: Mapping[str, Any]
    flow_map: bool = False


_FLOW_MAP = _Class("euler", "shift", {"num_train_timesteps": 1000}, flow_map=True)

# diffusers 0.42, schedulers/scheduling_{unipc_multistep,flow_match_euler_discrete}.py: the defaults that Wan relies on.
_CLASSES = {
    "UniPCMultistepScheduler": _Class(
        "unipc",
        "flow_shift",
        {
            "solver_order": 2,
            "solver_type": "bh2",
            "prediction_type": "flow_prediction",
            "predict_x0": True,
            "use_flow_sigmas": True,
            "lower_order_final": True,
            "disable_corrector": [],
            "final_sigmas_type": "zero",
            "use_dynamic_shifting": False,
            "thresholding": False,
        },
    ),
    "FlowMatchEulerDiscreteScheduler": _Class(
        "euler",
        "shift",
        {
            "use_dynamic_shifting": False,
            "stochastic_sampling": False,
            "invert_sigmas": False,
            "shift_terminal": None,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
        },
    ),
    "FlowMapEulerDiscreteScheduler": _FLOW_MAP,
    "FlowMapDiscreteScheduler": _FLOW_MAP,  # its name in NVlabs/AnyFlow, whose folders were published first
}


def read_scheduler(folder: Path) -> Scheduler | None:
    """What the folder of a model says; None if it says nothing. Raises ExportError if that is not computed here."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = read_document(path, _MAX_BYTES)
    except ExportError as error:
        raise ExportError(f"{error} {_CHOOSE}") from None
    called = config.get("_class_name")
    known = _CLASSES.get(called) if isinstance(called, str) else None
    if known is None:
        raise ExportError(
            f"{path} asks for {quote(called)}, which is not computed here (known: {', '.join(_CLASSES)}). {_CHOOSE}"
        )
    for name, wanted in known.must.items():
        if name in config and not _same(config[name], wanted):
            raise ExportError(
                f"{path} sets {name} to {quote(config[name])}, and only {quote(wanted)} is computed here for "
                f"{called}. {_CHOOSE}"
            )
    shift = config.get(known.shift)
    if shift is not None and (type(shift) not in (int, float) or not 1 <= shift <= 1000):
        raise ExportError(f"{path} sets {known.shift} to {quote(shift)}: a shift is 1 to 1000. {_CHOOSE}")
    return Scheduler(str(called), known.rule, None if shift is None else float(shift), known.flow_map)


def pipeline_class(folder: Path) -> str | None:
    """What `model_index.json` of the folder of a model calls its pipeline. Raises ExportError if it cannot be read."""
    path = folder / MODEL_INDEX
    called = read_document(path, _MAX_BYTES).get("_class_name") if path.is_file() else None
    return called if isinstance(called, str) else None


def _same(value: Any, wanted: Any) -> bool:
    """None stands for "off" in diffusers."""
    return value == wanted or (value is None and wanted in (False, []))
