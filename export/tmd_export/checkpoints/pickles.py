"""PyTorch's own files: a pickle of plain tensors, read by torch's weights-only unpickler, which runs no code."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tmd_engines.errors import quote

from ..errors import ExportError
from .mapped import Entry, Place, Tensors, one_line, short, span

PICKLES = (".pth", ".pt", ".ckpt", ".bin")

# Where training programs put the weights inside of a larger dictionary. The averaged ones come first: those are what
# their authors sample with.
WRAPPERS = (
    "generator_ema", "generator", "ema", "model_ema", "ema_model", "ema_state_dict",
    "state_dict", "model_state_dict", "model", "module",
)  # fmt: skip

_DEPTH = 3  # of dictionaries in dictionaries; a pickle can also hold one that contains itself
_MAX_PICKLE = 64 << 20  # of the index in front of the tensors; the largest known one has 0.2 MB


def open_pickle(path: Path) -> Tensors:
    _check_archive(path)
    wrapper, found = _tensors_of(path, _unpickle(path))
    tensors, size = Tensors((path,), {}, wrapper), path.stat().st_size
    for name, value in found.items():
        entry = Entry(tuple(value.shape), str(value.dtype).removeprefix("torch."))
        offset = _checkpoint_offset(value) + int(value.storage_offset()) * value.itemsize
        place = Place(path, offset, tuple(value.stride()))
        if _checkpoint_offset(value) < 0 or offset + span(entry.shape, place.stride) * value.itemsize > size:
            raise ExportError(
                f"{path} is not a complete PyTorch file ({quote(name)} does not lie inside of it): copy it again."
            )
        tensors.add(name, entry, place)
    return tensors


def _unpickle(path: Path) -> object:
    """What the file says of its tensors, without their values. Runs no code of the file."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
        if any(_checkpoint_offset(tensor) < 0 for tensor in _leaves(content)):  # torch before it told places for "meta"
            from torch._subclasses.fake_tensor import FakeTensorMode

            with FakeTensorMode():
                content = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except Exception as error:  # whatever a hostile pickle makes the unpickler stumble over
        message = one_line(error)
        if "Weights only load failed" in message:
            raise ExportError(
                f"{path} holds more than tensors, and loading that could run a program hidden in it: refused "
                f"({_culprit(message)}). Take the model as safetensors, or ask its publisher for the tensors alone."
            ) from None
        raise ExportError(
            f"{path} is not a complete PyTorch file of plain tensors ({short(message)}): copy it again."
        ) from None


def _checkpoint_offset(tensor: Tensor) -> int:
    """Where torch says that the values of a tensor without values lie in the file; -1 if it does not."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", -1) if tensor.layout == torch.strided else 0


def _check_archive(path: Path) -> None:
    """Torch's own format is a zip archive whose entries lie there uncompressed, ready to be mapped."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            order = next(
                (archive.read(e) for e in entries if e.filename.endswith("/byteorder") and e.file_size < 8), b""
            )
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ExportError(
            f"{path} is not a complete PyTorch file ({short(one_line(error)).lower()}): copy it again. A file "
            "written by PyTorch before 1.6 must be saved again with a newer one."
        ) from None
    for entry in entries:
        index = entry.filename.endswith("/data.pkl")
        if entry.compress_type != zipfile.ZIP_STORED or (index and entry.file_size > _MAX_PICKLE):
            raise ExportError(
                f"{path} is not written as PyTorch writes (its entry {quote(entry.filename)} is compressed or too "
                "large): take the file from its publisher again."
            )
    if order not in (b"", sys.byteorder.encode()):
        raise ExportError(f"{path} was written on a machine with another byte order: save it again on one like this.")


def _unwrap(content: object) -> tuple[str | None, object]:
    """The dictionary of tensors inside of what a training program saved, and the name under which it was found."""
    found: str | None = None
    for _ in range(_DEPTH):
        if not isinstance(content, dict) or any(isinstance(value, Tensor) for value in content.values()):
            break
        name = next((name for name in WRAPPERS if isinstance(content.get(name), dict)), None)
        if name is None:
            break
        for other, value in content.items():  # a critic, the weights without averaging, the optimizer, the epoch
            if other != name and not _is_plain(value):
                return None, {other: value}
        found, content = found or name, content[name]
    return found, content


def _is_plain(value: object, depth: int = 3 * _DEPTH) -> bool:
    """Whether a value beside the weights is only tensors, numbers and text, however they are arranged."""
    if isinstance(value, dict):
        return depth > 0 and all(_is_plain(inner, depth - 1) for inner in value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_plain(inner, depth - 1) for inner in value)
    return value is None or isinstance(value, Tensor | str | bytes | bool | int | float)


def _tensors_of(path: Path, content: object) -> tuple[str | None, dict[str, Tensor]]:
    """The name of the dictionary inside of the file, and its tensors. Raises ExportError if it holds anything else."""
    wrapper, state = _unwrap(content)
    where = quote(wrapper) if wrapper else "it"
    if not isinstance(state, dict) or not state:
        raise ExportError(f"{path} holds no tensors by name: it is no checkpoint of a model.")
    wrong = []
    for name, value in state.items():
        if not isinstance(name, str):
            wrong.append(f"the name {quote(name)} is no text")
        elif not isinstance(value, Tensor):
            if value is not None or not name.endswith("_extra_state"):
                wrong.append(f"{quote(name)} is of type {type(value).__name__}")
        elif value.layout != torch.strided or value.is_quantized:
            wrong.append(f"{quote(name)} is a tensor of a special kind")
    if wrong:
        raise ExportError(
            f"{path} holds more than tensors: in {where}, {wrong[0]}{_more(wrong)}. "
            "Save the tensors of the model alone, as one dictionary."
        )
    return wrapper, {name: value for name, value in state.items() if value is not None}


def _leaves(content: object, depth: int = _DEPTH) -> list[Tensor]:
    if isinstance(content, Tensor):
        return [content]
    inner = content.values() if isinstance(content, dict) and depth >= 0 else ()
    return [tensor for value in inner for tensor in _leaves(value, depth - 1)]


def _culprit(message: str) -> str:
    """From torch's long message, the name of what it would not load."""
    _, _, after = message.partition("GLOBAL ")
    return f"it asks for {quote(after.split()[0])}" if after else short(message)


def _more(names: Sequence[object]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
