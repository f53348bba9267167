"""Which files of a repository an export reads, told before they are there.

The repository is laid out hollow: its documents as they are and every other file empty, under its own name. What the
search in a folder on the disk finds there is what must be downloaded, and what it refuses there is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ..checkpoints.contents import MODEL_INDEX
from ..checkpoints.experts import FOLDERS as EXPERTS
from ..checkpoints.experts import experts_of
from ..checkpoints.folders import PLACES, WEIGHTS, Found, WeightFiles, find
from ..checkpoints.lora import FILES as LORA_FILES
from ..checkpoints.lora_config import CONFIG as LORA_CONFIG
from ..checkpoints.scheduler import CONFIG as SCHEDULER
from ..errors import ExportError
from .name import HubName

_INDEX = "diffusion_pytorch_model.safetensors.index.json"
DOCUMENTS = (
    MODEL_INDEX,
    *(Path(place, f"{stem}.safetensors.index.json").as_posix() for place, stems in PLACES for stem in stems),
    *(f"{expert}/{_INDEX}" for pair in EXPERTS for expert in pair if expert != "transformer"),
)
"""Files that say what a repository holds; small."""

_LISTED = 12
_MODELS = {
    "transformer": "student",
    "generator_inference_transformer": "student",
    "text_encoder": "text_encoder",
    "vae": "vae",
}


def lay_hollow(folder: Path, files: Iterable[str], there: Path) -> None:
    """Makes `files` below `folder`: `DOCUMENTS` and indexes as links to those in `there`, others empty."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (there / name).is_file() and name.endswith(".json"):
            path.symlink_to((there / name).resolve())
        else:
            path.touch()


def needed(hollow: Path, name: HubName, without: Collection[str]) -> list[str]:
    """Names of the files that `name` stands for, from a hollow repository: of one file what it needs beside it, of a
    whole repository the files of its models that are not among `without` (as in `parts.MODEL_OF`; "high" and "low" are
    the experts of a Wan2.2-A14B).

    Raises ExportError if the repository has no such file, or not one model but many files.
    """
    files = _of_one(hollow, name, name.file) if name.file is not None else _of_all(hollow, name, without)
    return sorted({path.relative_to(hollow).as_posix() for path in files})


def needed_of_lora(hollow: Path, name: HubName) -> list[str]:
    """The same for a LoRA: the file itself, or that of PEFT or diffusers at the root of the repository."""
    file = name.file or next((file for file in LORA_FILES if (hollow / file).is_file()), None)
    if file is None:
        raise ExportError(f"{name} has no {' or '.join(LORA_FILES)}: {_choices(hollow, name)}")
    return sorted(path.relative_to(hollow).as_posix() for path in _of_one(hollow, name, file))


def _of_one(hollow: Path, name: HubName, file: str) -> Iterator[Path]:
    path = hollow / file
    if not path.is_file():
        raise ExportError(f"{hollow} has no file {file}: {_choices(hollow, name)}")
    yield path
    if file.endswith(WEIGHTS) or file.endswith(".safetensors.index.json"):
        for one in find(path).weights:
            yield from _with_documents(one)


def _of_all(hollow: Path, name: HubName, without: Collection[str]) -> Iterator[Path]:
    experts = experts_of([hollow])
    if experts is not None:
        for side, path in (("high", experts.high), ("low", experts.low)):
            if side not in without:
                yield from (file for one in find(path, experts=True).weights for file in _with_documents(one))
    try:
        found = find(hollow, experts=experts is not None)
    except ExportError as error:
        if (hollow / MODEL_INDEX).is_file() or not _weights(hollow):
            raise
        raise ExportError(f"{error} {_choices(hollow, name)}") from None
    indexed = (hollow / MODEL_INDEX).is_file()  # then the same again at the root, in the original layout, is passed by
    for one in found.weights:
        if _model(one, found, hollow) not in without and not (indexed and one.files[0].parent == hollow):
            yield from _with_documents(one)
    if found.tokenizer is not None and "text_encoder" not in without:
        yield found.tokenizer
    yield from (path for path in (hollow / MODEL_INDEX, hollow / SCHEDULER) if path.is_file())


def _with_documents(weights: WeightFiles) -> Iterator[Path]:
    """Files of weights, and those beside them that say what they are."""
    yield from (*weights.index, *weights.files)
    first = weights.files[0]
    beside = (first.with_name("config.json"), first.with_suffix(".json"), first.with_name(LORA_CONFIG))
    yield from (path for path in beside if path.is_file())


def _model(weights: WeightFiles, found: Found, hollow: Path) -> str | None:
    """What files are by their place alone; None where that does not tell."""
    if weights.part is not None:
        return weights.part
    folder = weights.files[0].parent
    if folder == hollow:
        return (
            "student"
            if len(found.weights) > 1 and weights.files[0].stem.startswith("diffusion_pytorch_model")
            else None
        )
    return _MODELS.get(folder.name)


def _weights(hollow: Path) -> list[str]:
    return sorted(path.relative_to(hollow).as_posix() for path in hollow.rglob("*") if path.suffix in WEIGHTS)


def _choices(hollow: Path, name: HubName) -> str:
    """A sentence on the files that can be named instead."""
    files = _weights(hollow)
    if not files:
        return "it has no file of weights that is read here."
    listed = ", ".join(files[:_LISTED]) + (f" and {len(files) - _LISTED} more" if len(files) > _LISTED else "")
    return f"name one of its files of weights, as in {HubName(name.repo, name.revision, files[0])}. It has {listed}."
