"""What passes from one machine, or one day, to another: prompt embeddings and latents, each as a safetensors file.

An edge device with an embeddings file needs no text encoder; a latents file, written before decoding begins, saves the
denoising if decoding fails. The formats are in `docs/bundle.md`. Files are complete under their names or not there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tmd_engines.device.paths import utf8_name
from tmd_engines.errors import one_line, quote

from ..errors import RuntimeFailure
from .target import Target, cannot_write

if TYPE_CHECKING:
    from typing import Self

    from tmd_engines import Manifest

    from ..settings import Settings

EMBEDS_FORMAT = "tmd-embeds-1"
LATENTS_FORMAT = "tmd-latents-1"
DETAILS = ("class", "rho", "strength", "schedule")
MAX_NAME, MAX_PROMPT = 1_000, 65_536
"""Characters that a file may say in one field, and of a prompt (or a schedule)."""


@dataclass(frozen=True)
class Embeddings:
    """A prompt as the transformer reads it: `prompt_embeds` float32 `[1, text, E]`, and the same of the negative prompt
    where guidance needs one."""

    prompt: str
    prompt_embeds: NDArray[np.float32] = field(repr=False)
    negative_prompt: str = ""
    negative_embeds: NDArray[np.float32] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Latents:
    """A denoised video before decoding: `latents` float32 `[1, C, T, h, w]`, normalised, and the run that made them.

    `size` is (width, height) in pixels, `model` the name in the manifest of the bundle, `details` are those of the
    settings.
    """

    latents: NDArray[np.float32] = field(repr=False)
    model: str
    prompt: str
    seed: int
    steps: int
    inner_steps: int
    nfe: float
    rule: str
    guidance: float
    size: tuple[int, int]
    details: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings, latents: NDArray[np.float32], model: str, prompt: str) -> Self:
        """What a run with these settings made."""
        same = ("seed", "steps", "inner_steps", "nfe", "rule", "guidance", "details")
        size = settings.width, settings.height
        return cls(latents, model, prompt, size=size, **{name: getattr(settings, name) for name in same})


class Said:
    """What a file says of itself, from whoever wrote it: each field is checked before it goes on.

    Raises RuntimeFailure.
    """

    def __init__(self, path: Path, metadata: dict[str, str]) -> None:
        self._path, self._metadata = path, metadata

    def text(self, name: str, longest: int = MAX_NAME) -> str:
        """A field as it stands there; what shows it escapes what must not reach a screen."""
        if name not in self._metadata:
            raise self._wrong(name, "is missing")
        text = self._metadata[name]
        if len(text) > longest:
            raise self._wrong(name, f"has {len(text)} characters, more than {longest}")
        return text

    def name(self, name: str) -> str:
        """A field of a program's own words, which other files repeat: without control characters."""
        text = self.text(name)
        if not text.isprintable():
            raise self._wrong(name, f"is {quote(text, 40)}, and must not hold control characters")
        return text

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number from low to high."""
        text = self.text(name)
        if not re.fullmatch(r"[0-9]{1,20}", text, re.ASCII) or not low <= int(text) <= high:
            raise self._wrong(name, f"is {quote(text, 40)}, and must be a whole number from {low} to {high}")
        return int(text)

    def number(self, name: str) -> float:
        """A finite number, not negative."""
        text = self.text(name)
        if not re.fullmatch(r"[0-9.]+(e[+-]?[0-9]{1,3})?", text, re.ASCII) or not _is_number(text):
            raise self._wrong(name, f"is {quote(text, 40)}, and must be a finite number")
        return float(text)

    def _wrong(self, name: str, why: str) -> RuntimeFailure:
        return RuntimeFailure(
            f"{self._path} does not say how it was made: {name} {why}. Make it again with --save-latents or "
            "--save-embeds."
        )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def encoder_sha256(manifest: Manifest) -> str | None:
    """What tells one text encoder from another: the sha256 of the hex sha256 of its files, one per line. None: no
    encoder in this bundle.

    The files are those of the graph, of its data and of the embedding table, as far as the bundle has them.
    """
    graph = manifest.graphs.get("text_encoder")
    if graph is None:
        return None
    table = manifest.text.embedding
    files = filter(None, (graph.file, graph.data, table.file if table else None))
    lines = "".join(f"{manifest.files[file].sha256}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def save_embeds(path: str | Path, embeds: Embeddings, manifest: Manifest) -> None:
    """Write `embeds`, made by the text encoder of this bundle. Raises RuntimeFailure if `path` cannot be written."""
    tensors = {"prompt_embeds": embeds.prompt_embeds[0]}
    metadata = {"format": EMBEDS_FORMAT, "prompt": embeds.prompt, "encoder": encoder_sha256(manifest) or ""}
    if embeds.negative_embeds is not None:
        tensors["negative_embeds"] = embeds.negative_embeds[0]
        metadata["negative_prompt"] = embeds.negative_prompt
    _save(Path(path), tensors, metadata)


def load_embeds(path: str | Path, manifest: Manifest) -> Embeddings:
    """Read a file of `save_embeds` for this bundle, filled with zero rows up to its text length if it pads prompts.

    Raises RuntimeFailure if it is no such file, has another width or more rows than the model reads, or comes from
    another text encoder than the bundle's (a bundle without one takes what fits).
    """
    path = Path(path)
    tensors, metadata = _load(path, EMBEDS_FORMAT, "an embeddings file (tmd-run --save-embeds)")
    own = encoder_sha256(manifest)
    if own is not None and metadata.get("encoder") != own:
        raise RuntimeFailure(
            f"{path} was made by another text encoder (sha256 {_shown(metadata.get('encoder', ''))}...) than this "
            f"bundle has ({own[:12]}...): make it again with this bundle (--save-embeds)."
        )
    text = manifest.text
    found: dict[str, NDArray[np.float32]] = {}
    for name in ("prompt_embeds", "negative_embeds"):
        rows = tensors.get(name)
        if rows is None:
            continue
        if rows.ndim != 2 or rows.shape[1] != text.dim or not 1 <= rows.shape[0] <= text.max_length:
            raise RuntimeFailure(
                f"{path} has {name} of shape {list(rows.shape)}, and this bundle reads at most [{text.max_length}, "
                f"{text.dim}]: it belongs to another model."
            )
        length = len(rows) if text.tokenization == "plain" else text.max_length
        found[name] = np.zeros((1, length, text.dim), np.float32)
        found[name][0, : len(rows)] = rows
    if "prompt_embeds" not in found:
        raise RuntimeFailure(f"{path} holds no prompt_embeds: make it again with --save-embeds.")
    says = Said(path, {"prompt": "", "negative_prompt": "", **metadata})
    return Embeddings(
        says.text("prompt", MAX_PROMPT),
        found["prompt_embeds"],
        says.text("negative_prompt", MAX_PROMPT),
        found.get("negative_embeds"),
    )


def _shown(text: str) -> str:
    return quote(text[:12])[1:-1]


def save_latents(path: str | Path, latents: Latents) -> None:
    """Write `latents`. Raises RuntimeFailure if `path` cannot be written."""
    numbers = {name: str(getattr(latents, name)) for name in ("seed", "steps", "inner_steps", "nfe", "guidance")}
    metadata = {"format": LATENTS_FORMAT, "model": latents.model, "prompt": latents.prompt, "rule": latents.rule}
    size = {"width": str(latents.size[0]), "height": str(latents.size[1])}
    _save(Path(path), {"latents": latents.latents[0]}, {**latents.details, **metadata, **numbers, **size})


def load_latents(path: str | Path, manifest: Manifest) -> Latents:
    """Read a file of `save_latents` for a bundle that can decode it.

    Raises RuntimeFailure if it is no such file, or its shape is not what this bundle decodes.
    """
    path = Path(path)
    tensors, metadata = _load(path, LATENTS_FORMAT, "a latents file (tmd-run --save-latents)")
    latents, geometry = tensors.get("latents"), manifest.latents
    if latents is None or latents.ndim != 4 or latents.shape[0] != geometry.channels or 0 in latents.shape:
        raise RuntimeFailure(
            f"{path} has latents of shape {None if latents is None else list(latents.shape)}, and this bundle decodes "
            f"[{geometry.channels}, frames, height, width]: use the bundle that made them, or one of the same model."
        )
    if manifest.family.makes_stills and latents.shape[1] != 1:
        raise RuntimeFailure(
            f"{path} holds the latents of a video, {latents.shape[1]} in time, and this bundle decodes stills: use the "
            "bundle that made them."
        )
    says = Said(path, metadata)
    found = Latents(
        latents=np.ascontiguousarray(latents[None], np.float32),
        model=says.name("model"),
        prompt=says.text("prompt", MAX_PROMPT),
        seed=says.whole("seed", 0, 2**64 - 1),
        steps=says.whole("steps", 1, 10**6),
        inner_steps=says.whole("inner_steps", 1, 10**6),
        nfe=says.number("nfe"),
        rule=says.name("rule"),
        guidance=says.number("guidance"),
        size=(says.whole("width", 1, 10**6), says.whole("height", 1, 10**6)),
        details={name: says.text(name, MAX_PROMPT) for name in DETAILS if name in metadata},
    )
    width, height = (side * geometry.spatial_stride for side in (latents.shape[3], latents.shape[2]))
    if found.size != (width, height):
        raise RuntimeFailure(
            f"{path} holds latents that this bundle decodes to {width}x{height} pixels, and they were made for "
            f"{found.size[0]}x{found.size[1]}: use the bundle that made them."
        )
    return found


def _save(path: Path, tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    target = Target(path, is_folder=False)
    try:
        with open(target.temporary, "wb") as file:
            file.write(_safetensors(tensors, metadata))
    except OSError as error:
        target.discard()
        raise cannot_write(path, error) from error
    except BaseException:
        target.discard()
        raise
    target.commit()


def _safetensors(tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> bytes:
    """A safetensors file of float32 tensors. The library's own writer puts the metadata in another order each time."""
    # A lone surrogate, which a command line can hold, is no UTF-8.
    words = {name: text.encode("utf-8", "replace").decode() for name, text in sorted(metadata.items())}
    header: dict[str, Any] = {"__metadata__": words}
    whole = b""
    for name, value in sorted(tensors.items()):
        content = np.ascontiguousarray(value, "<f4").tobytes()
        place = [len(whole), len(whole) + len(content)]
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": place}
        whole += content
    line = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    line += b" " * (-len(line) % 8)  # so that the numbers are aligned
    return struct.pack("<Q", len(line)) + line + whole


def _load(path: Path, wanted: str, what: str) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    """Tensors as float32, and the metadata, of a safetensors file whose `format` is `wanted`."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise RuntimeFailure(f"{path} {'is no file' if path.exists() else 'does not exist'}: name {what}.")
    try:
        with safe_open(utf8_name(path), "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != wanted:
                raise RuntimeFailure(f"{path} is a safetensors file of another kind: name {what}.")
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  (it is no dict)
            odd = [kind for kind in kinds.values() if kind not in ("F32", "F16")]
            if odd:
                raise RuntimeFailure(
                    f"{path} holds numbers of the type {quote(odd[0])[1:-1]}; float32 and float16 can be read."
                )
            tensors = {name: file.get_tensor(name).astype(np.float32) for name in kinds}
    except (SafetensorError, OSError, ValueError) as error:
        raise RuntimeFailure(f"{path} cannot be read as {what}: {one_line(error)}. Copy it again.") from error
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise RuntimeFailure(f"{path} holds NaN or Inf in {quote(name)[1:-1]}: it is damaged. Make it again.")
    return tensors, metadata
