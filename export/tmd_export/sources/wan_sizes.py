"""The sizes of a Wan transformer, read from its tensors; `config.json` beside them tells what tensors cannot, and must
agree in everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tmd_engines.errors import quote
from tmd_ref.flow_map import GATE
from tmd_ref.wan import WAN_CONFIGS, WanConfig

from ..checkpoints import Checkpoint
from ..checkpoints.documents import read_document
from ..errors import ExportError

_HEAD = 128  # numbers in a head of every Wan that was published
_PATCH = (1, 2, 2)
_MAX_CONFIG = 1 << 20

# What config.json calls a size, in the original layout and in that of diffusers.
_STATED: Mapping[str, Callable[[WanConfig], Any]] = {
    "dim": lambda c: c.dim,
    "num_layers": lambda c: c.num_layers,
    "ffn_dim": lambda c: c.ffn_dim,
    "freq_dim": lambda c: c.freq_dim,
    "text_dim": lambda c: c.text_dim,
    "text_len": lambda c: c.text_len,
    "in_dim": lambda c: c.in_channels,
    "in_channels": lambda c: c.in_channels,
    "out_dim": lambda c: c.out_channels,
    "out_channels": lambda c: c.out_channels,
    "num_heads": lambda c: c.num_heads,
    "num_attention_heads": lambda c: c.num_heads,
    "attention_head_dim": lambda c: c.head_dim,
    "patch_size": lambda c: list(c.patch_size),
}


def read_sizes(checkpoint: Checkpoint) -> WanConfig:
    """The sizes of the transformer in `checkpoint`. Raises ExportError if they cannot be told or contradict."""
    path, stated = _config(checkpoint)
    size = checkpoint.size()
    shapes = {name: checkpoint.shape(name) for name in _TELLING}
    absent = [name for name, shape in shapes.items() if len(shape) < 2]
    if not size.dim or not size.blocks or absent:
        raise ExportError(
            f"{checkpoint.where} is not a whole transformer: it lacks {quote(absent[0] if absent else 'blocks')}. "
            "Copy it again."
        )
    if size.blocks < 2:
        raise ExportError(f"{checkpoint.where} has a single block: a backbone and a flow head need one each.")
    patch = shapes["patch_embedding.weight"]
    cells = _PATCH[0] * _PATCH[1] * _PATCH[2]
    takes, gives = patch[1] if len(patch) == 5 else patch[1] // cells, shapes["head.head.weight"][0] // cells
    if takes != gives:
        raise ExportError(
            f"{checkpoint.where} takes latents of {takes} channels and makes latents of {gives}: it is told more than "
            "a prompt, such as a picture or a video. Take the text-to-video model."
        )
    usual = size.dim // _HEAD if size.dim % _HEAD == 0 else None
    heads = stated.get("num_heads", stated.get("num_attention_heads", usual))
    if type(heads) is not int or heads < 1 or size.dim % heads:
        raise ExportError(
            f"{checkpoint.where} has width {size.dim}, and tensors do not tell the number of attention heads: put the "
            "config.json of this model beside it, with num_heads."
        )
    try:
        return WanConfig(
            dim=size.dim,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            num_heads=heads,
            num_layers=size.blocks,
            in_channels=takes,
            out_channels=gives,
            freq_dim=shapes["time_embedding.0.weight"][1],
            text_dim=shapes["text_embedding.0.weight"][1],
            text_len=_length(path, stated),
        )
    except ValueError as error:
        raise ExportError(f"{checkpoint.where}: {error}") from None


_TELLING = (
    "patch_embedding.weight",
    "blocks.0.ffn.0.weight",
    "head.head.weight",
    "time_embedding.0.weight",
    "text_embedding.0.weight",
)


def check_config(checkpoint: Checkpoint, wan: WanConfig) -> None:
    """Raises ExportError if config.json beside `checkpoint` states another size than `wan` has."""
    path, stated = _config(checkpoint)
    for name, size in _STATED.items():
        if name in stated and stated[name] != size(wan):
            raise ExportError(
                f"{path} says that {name} is {quote(stated[name])}, and the weights beside it are of a model with "
                f"{quote(size(wan))}: they do not belong together. Copy both again from one place."
            )


def read_gate(checkpoint: Checkpoint) -> float | None:
    """How much the second time counts in a flow map (`tmd_ref.flow_map`), which tensors do not tell: as config.json
    says, else as in all of AnyFlow. None for a transformer that is told one time. Raises ExportError for a flow map
    that is told something else than the time to go to."""
    if not checkpoint.shape("delta_embedding.0.weight"):
        return None
    path, stated = _config(checkpoint)
    gate, second = stated.get("gate_value", GATE), stated.get("deltatime_type", "r")
    if type(gate) not in (int, float) or not 0 < gate < 1:
        raise ExportError(f"{path} says that gate_value is {quote(gate)}: it is a share. Copy it again.")
    if second != "r":
        raise ExportError(
            f"{path} says that deltatime_type is {quote(second)}: only 'r', the time to go to, is computed here. This "
            "checkpoint cannot be exported."
        )
    return float(gate)


def known_name(wan: WanConfig) -> str:
    """What a model of these sizes is called: one of `--model`, or a name made of its sizes."""
    return next((name for name, config in WAN_CONFIGS.items() if config == wan), f"wan-{wan.dim}x{wan.num_layers}")


def _length(path: Path, stated: Mapping[str, Any]) -> int:
    length = stated.get("text_len", WanConfig.text_len)
    if type(length) is not int or not 1 <= length <= 65536:
        raise ExportError(f"{path} says that text_len is {quote(length)}: it is a number of tokens. Copy it again.")
    return length


def _config(checkpoint: Checkpoint) -> tuple[Path, dict[str, Any]]:
    """config.json beside the weights, and what it states; empty if there is none."""
    path = checkpoint.tensors.files[0].parent / "config.json"
    return path, read_document(path, _MAX_CONFIG) if path.is_file() else {}
