"""The reference in PyTorch: Wan2.1's transformer, VAE and text encoder, the TMD student made from them, the samplers
and the distillation. It defines what is right; the export and the tests measure themselves against it. It is not the
fast path and not what a product ships: that is `tmd_runtime`, which never imports it. Names below load on first use, so
that importing the package alone does not import torch.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "WAN_CONFIGS": "wan",
    "WanConfig": "wan",
    "WanTransformer": "wan",
    "UMT5_CONFIGS": "umt5",
    "UMT5Config": "umt5",
    "UMT5Encoder": "umt5",
    "TAEHV": "taehv",
    "WAN_VAE_CONFIGS": "vae",
    "WanVAE": "vae",
    "WanVAEConfig": "vae",
    "Tokenizer": "text",
    "clean_prompt": "text",
    "SplitWan": "split",
    "TMDStudent": "student",
    "load_student": "student",
    "save_student": "student",
    "effective_nfe": "samplers",
    "euler_sample": "samplers",
    "shift_grid": "samplers",
    "tmd_sample": "samplers",
    "unipc_sample": "samplers",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
