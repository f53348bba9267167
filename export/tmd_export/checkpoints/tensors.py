"""Tensors of checkpoint files by name, read one at a time and mapped from the disk.

A checkpoint is untrusted input. Safetensors files hold nothing but tensors; a `.pth` or `.pt` file is a pickle and is
read by torch's weights-only unpickler, which runs no code, and then must hold tensors only.
"""

from __future__ import annotations

import errno
import json
import mmap
import struct
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmd_engines.errors import quote

from ..errors import ExportError

PICKLES = (".pth", ".pt", ".ckpt", ".bin")

# Where training programs put the weights inside of a larger dictionary. The averaged ones come first: those are what
# their authors sample with.
WRAPPERS = ("generator_ema", "generator", "ema", "model_ema", "state_dict", "model_state_dict", "model", "module")

_DEPTH = 3  # of dictionaries in dictionaries; a pickle can also hold one that contains itself
_MAX_PICKLE = 64 << 20  # of the index in front of the tensors; the largest known one has 0.2 MB

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Entry:
    """Shape and dtype (torch's name for it, or safetensors' own where torch has none) of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: byte of its first element in `file`, and steps in elements along its dimensions."""

    file: Path
    offset: int
    stride: tuple[int, ...]


class Tensors:
    """What some files hold: `entries` by name, the `files`, their `metadata` (safetensors), and the name of the
    dictionary inside of the file that the tensors were found in, `wrapper`."""

    def __init__(self, files: Sequence[Path], metadata: dict[str, str], wrapper: str | None = None) -> None:
        self.files, self.metadata, self.wrapper = tuple(files), metadata, wrapper
        self.entries: dict[str, Entry] = {}
        self._places: dict[str, _Place] = {}

    def add(self, name: str, entry: Entry, place: _Place) -> None:
        """Raises ExportError if there is one of that name."""
        if name in self._places:
            raise ExportError(
                f"{quote(name)} is in {self._places[name].file.name} and in {place.file.name} of {place.file.parent}: "
                "the shards do not belong together. Copy all of them again from one place."
            )
        self.entries[name], self._places[name] = entry, place

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the CPU as it is stored, its memory mapped from the file. KeyError if there is none.

        A mapping of its own for each tensor: with the tensor go its pages, and no machine refuses to map a file that is
        larger than its memory (as Linux does for the copy-on-write mapping of a whole file, which torch makes).
        """
        entry, place = self.entries[name], self._places[name]
        dtype = getattr(torch, entry.dtype)
        if 0 in entry.shape:
            return torch.empty(entry.shape, dtype=dtype)
        count, size = _span(entry.shape, place.stride), dtype.itemsize
        start = place.offset - place.offset % mmap.ALLOCATIONGRANULARITY
        inside = place.offset - start
        try:
            with open(place.file, "rb") as file:
                mapped = mmap.mmap(file.fileno(), inside + count * size, access=mmap.ACCESS_COPY, offset=start)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) == errno.ENOMEM:
                raise MemoryError(f"{quote(name)} of {place.file} cannot be mapped") from None
            raise ExportError(f"{place.file} changed while it was read ({_one_line(error)}): start again.") from None
        if place.offset % size:
            mapped, inside = bytearray(mapped[inside:]), 0  # type: ignore[assignment]
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=inside)
        return flat.as_strided(entry.shape, place.stride)


def open_tensors(files: Sequence[Path], weight_map: Mapping[str, str] | None = None) -> Tensors:
    """The tensors of one file, or of the safetensors shards of one model; only what precedes the values is read.

    `weight_map`: tensor -> name of its shard, from the index. Raises ExportError for a file that is incomplete, holds
    something else than tensors, or does not hold what the index says.
    """
    if len(files) == 1 and files[0].suffix in PICKLES:
        return _pickled(files[0])
    tensors = Tensors(files, {})
    for path in files:
        _add_safetensors(tensors, path)
    home = {name: place.file.name for name, place in tensors._places.items()}
    astray = [name for name, shard in (weight_map or {}).items() if home.get(name) != shard]
    if astray:
        raise ExportError(
            f"the index of {files[0].parent} has {quote(astray[0])} in {quote((weight_map or {})[astray[0]])}, and it "
            f"is not there{_more(astray)}: index and shards do not belong together. Copy all again from one place."
        )
    return tensors


def _add_safetensors(tensors: Tensors, path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks that types, shapes and places fit each other and the file. The places it keeps to itself.
        with safe_open(path, "np") as file:
            tensors.metadata |= file.metadata() or {}
        with open(path, "rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        message = _one_line(error)
        if "unknown variant" in message:
            unknown = message.partition("unknown variant")[2].split(",")[0].strip()
            raise ExportError(
                f"{path} has numbers of a type that is unknown here ({unknown}): "
                "take the file of the same model in float32, float16 or bfloat16."
            ) from None
        raise ExportError(f"{path} is not a complete safetensors file ({_short(message)}): copy it again.") from None
    for name, entry in header.items():
        if name != "__metadata__":
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            place = _Place(path, 8 + length + entry["data_offsets"][0], _contiguous(shape))
            tensors.add(name, Entry(shape, _DTYPES.get(dtype, dtype)), place)


def _pickled(path: Path) -> Tensors:
    _check_archive(path)
    wrapper, found = _tensors_of(path, _unpickle(path))
    tensors, size = Tensors((path,), {}, wrapper), path.stat().st_size
    for name, value in found.items():
        entry = Entry(tuple(value.shape), str(value.dtype).removeprefix("torch."))
        offset = _checkpoint_offset(value) + int(value.storage_offset()) * value.itemsize
        place = _Place(path, offset, tuple(value.stride()))
        if _checkpoint_offset(value) < 0 or offset + _span(entry.shape, place.stride) * value.itemsize > size:
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
        message = _one_line(error)
        if "Weights only load failed" in message:
            raise ExportError(
                f"{path} holds more than tensors, and loading that could run a program hidden in it: refused "
                f"({_culprit(message)}). Take the model as safetensors, or ask its publisher for the tensors alone."
            ) from None
        raise ExportError(
            f"{path} is not a complete PyTorch file of plain tensors ({_short(message)}): copy it again."
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
            f"{path} is not a complete PyTorch file ({_short(_one_line(error)).lower()}): copy it again. A file "
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
        for other, value in content.items():  # beside the one that is taken: a critic, the weights without averaging
            if other != name and not (isinstance(value, dict) and _is_state(value)):
                return None, {other: value}
        found, content = found or name, content[name]
    return found, content


def _is_state(value: dict[Any, Any], depth: int = _DEPTH) -> bool:
    return depth > 0 and all(
        isinstance(inner, Tensor) or inner is None or (isinstance(inner, dict) and _is_state(inner, depth - 1))
        for inner in value.values()
    )


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


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= side
    return tuple(reversed(strides))


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor, both counted."""
    return 1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


def _culprit(message: str) -> str:
    """From torch's long message, the name of what it would not load."""
    _, _, after = message.partition("GLOBAL ")
    return f"it asks for {quote(after.split()[0])}" if after else _short(message)


def _short(message: str) -> str:
    return quote(message, 200)[1:-1]


def _more(names: Sequence[object]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
