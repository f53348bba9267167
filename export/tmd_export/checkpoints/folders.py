"""The files of a checkpoint: a single one, a folder in one of the published layouts, or one as tmd-distill leaves it.

Only names of files decide here; what they hold is for `recognise`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from tmd_engines.errors import quote

from ..errors import ExportError
from .contents import named_models, refuse_incomplete, refuse_unused
from .documents import read_document
from .experts import has_experts, is_of_expert, refuse_experts_in
from .hub_cache import in_snapshot
from .tensors import CONTAINERS, Tensors, open_tensors

WEIGHTS = CONTAINERS
TOKENIZERS = ("google/umt5-xxl/spiece.model", "tokenizer/spiece.model", "spiece.model", "tokenizer.model")

# Where the parts lie: a folder inside of the checkpoint, and the names (without .safetensors) that a file has there.
PLACES = (
    ("", ("diffusion_pytorch_model", "model", "student", "vae", "umt5", "mlx_dit")),
    ("transformer", ("diffusion_pytorch_model",)),
    ("generator_inference_transformer", ("diffusion_pytorch_model",)),
    ("text_encoder", ("model",)),
    ("vae", ("diffusion_pytorch_model",)),
)
_ORIGINAL = {"text_encoder": "models_t5*", "vae": "Wan2.[12]_VAE*"}  # one file each beside an original transformer
_OWN = "student.safetensors"  # tmd-distill's: beside it lie whatever a training leaves
_MAX_INDEX = 16 << 20


@dataclass(frozen=True)
class WeightFiles:
    """Files that together hold one part, and the `index` that names them. `part` is known only where the name of the
    file says it."""

    files: tuple[Path, ...]
    weight_map: dict[str, str] = field(default_factory=dict)
    part: str | None = None
    index: tuple[Path, ...] = ()
    expert: bool = False  # one of a Wan2.2-A14B, and the other one is there too

    def open(self) -> Tensors:
        """Raises ExportError as `open_tensors`."""
        return open_tensors(self.files, self.weight_map)


@dataclass(frozen=True)
class Found:
    """What one path given by the user leads to.

    `named` are the models that a folder says that it holds, whether they are there or not; `notes` are sentences for
    the user.
    """

    path: Path
    weights: tuple[WeightFiles, ...]
    tokenizer: Path | None
    named: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find(path: Path, given: Collection[Path] = (), experts: bool = False) -> Found:
    """The weights and the tokenizer under `path`, a file or a folder; `given` are the other paths of the user. With
    `experts` the two transformers of a Wan2.2-A14B are used: in the folder that holds both they are passed by.

    Raises ExportError if there are no weights, or if the folder names or holds more than would be used: half of a model
    must not pass for the whole.
    """
    if experts:
        found = _find(path, given, has_experts(path))
        return replace(found, weights=tuple(replace(one, expert=True) for one in found.weights))
    return _find(path, given)


def _find(path: Path, given: Collection[Path], holds_experts: bool | None = None) -> Found:
    """`holds_experts` None: there must be none."""
    if path.is_file():
        return _single(path)
    if not path.is_dir():
        gone = f"{path} is a link to nothing" if path.is_symlink() else f"there is no {path}"
        raise ExportError(f"{gone}: give the file or the folder of a checkpoint. Check the path.")
    refuse_incomplete(path)
    named = named_models(path, holds_experts is not None)
    weights = _weights(path)
    passed = [one for one in weights if holds_experts and is_of_expert(one.files[0], path)]
    tokenizer = next((path / name for name in TOKENIZERS if (path / name).is_file()), None)
    notes: tuple[str, ...] = ()
    if not (path / _OWN).is_file():
        if holds_experts is None:
            refuse_experts_in(path)
        notes = _unused(path, weights, [*given, *(_inside_experts(path) if holds_experts else ())])
    weights = [one for one in weights if one not in passed]
    if not weights and not holds_experts:
        raise ExportError(_nothing_in(path))
    return Found(path, tuple(weights), tokenizer, named, notes)


def _inside_experts(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if is_of_expert(path, folder)]


def _unused(path: Path, weights: list[WeightFiles], given: Collection[Path]) -> tuple[str, ...]:
    used = {file for one in weights for file in (*one.files, *one.index)} | {path / name for name in TOKENIZERS}
    used |= {index for index in path.rglob("*.safetensors.index.json") if _left_out(index)}
    loose = refuse_unused(path, used | set(given)) if weights else ()
    return (f"not used of {path}: {', '.join(loose)}.",) if loose else ()


def _weights(path: Path) -> list[WeightFiles]:
    """What the places of the known layouts hold. Raises ExportError for shards without an index, and two files of one
    part."""
    weights = []
    for place, stems in PLACES:
        folder = path / place
        for stem in stems:
            index = folder / f"{stem}.safetensors.index.json"
            if index.is_file():
                if not _left_out(index):
                    weights.append(_sharded(index))
            elif (folder / f"{stem}.safetensors").is_file():
                weights.append(WeightFiles((folder / f"{stem}.safetensors",)))
            elif shards := sorted(folder.glob(f"{stem}-*-of-*.safetensors")):
                raise ExportError(
                    f"{folder} has {shards[0].name}, but not {index.name}, which says what belongs to it: "
                    "copy the whole folder again."
                )
    for part, pattern in _ORIGINAL.items():
        files = [file for file in sorted(path.glob(pattern)) if file.suffix in WEIGHTS]
        if len(files) > 1:
            raise ExportError(
                f"{path} has {files[0].name} and {files[1].name}: it is unclear which one is meant. Move one away."
            )
        weights += [WeightFiles((file,), part=part) for file in files]
    return weights


def _single(path: Path) -> Found:
    if path.suffix == ".model":
        return Found(path, (), path)
    if path.name.endswith(".safetensors.index.json"):
        return Found(path, (_sharded(path),), None)
    if path.suffix not in WEIGHTS:
        raise ExportError(f"{path} is no file of weights: those end in {', '.join(WEIGHTS)}.")
    return Found(path, (WeightFiles((path,)),), None)


def _left_out(index: Path) -> bool:
    """Whether an index is that of a model which was not downloaded from the hub: none of its shards is there."""
    if not in_snapshot(index):
        return False
    weight_map = read_document(index, _MAX_INDEX).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return bool(names) and not any(isinstance(name, str) and (index.parent / name).exists() for name in names)


def _sharded(index: Path) -> WeightFiles:
    """The shards that an index names. A name may lead nowhere but to a file beside the index."""
    weight_map = read_document(index, _MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ExportError(f"{index} has no weight_map from tensors to files: it is no index of a model. Copy it again.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", name):
            raise ExportError(
                f"{index} names {quote(name)} as a file of weights: only a plain .safetensors name beside the index is "
                "allowed, because a checkpoint must not lead elsewhere. Take the checkpoint from its publisher."
            )
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ExportError(
            f"{index.parent} lacks {', '.join(absent[:6])}{' and more' if len(absent) > 6 else ''} "
            f"({len(absent)} of {len(names)} shards that {index.name} names): copy them too."
        )
    return WeightFiles(tuple(index.parent / name for name in names), weight_map, index=(index,))


def _nothing_in(folder: Path) -> str:
    loose = sorted(file.name for file in folder.iterdir() if file.suffix in WEIGHTS)
    hint = f" To use {loose[0]}, give that file itself." if loose else ""
    return (
        f"{folder} has no student.safetensors and no other file of weights by a name that is known here: a checkpoint "
        "is a folder as tmd-distill leaves it (student.safetensors and, for the other parts, vae.safetensors, "
        "umt5.safetensors, tokenizer.model), an official Wan folder (diffusion_pytorch_model.safetensors or its "
        "shards, models_t5_umt5-xxl-enc-bf16.pth, Wan2.1_VAE.pth or Wan2.2_VAE.pth, google/umt5-xxl/spiece.model), or "
        f"the same in diffusers' layout (transformer, text_encoder, vae, tokenizer).{hint}"
    )
