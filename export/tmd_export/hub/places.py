"""Where the checkpoints and LoRAs that a user names lie on this machine; those of the hub are downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ..checkpoints import Checkpoint, find
from ..checkpoints.experts import expert_named
from ..checkpoints.hub_cache import inside_cache
from ..errors import ExportError
from ..loras import LoraFile
from ..parts import MODEL_OF
from .headers import with_headers
from .name import HubName, is_hub_name, parse_hub_name
from .needed import DOCUMENTS, lay_hollow, needed, needed_of_lora
from .repository import Repository, Say

_OF_FILE = {"transformer": "student"}  # what a file holds -> the model of `parts.MODEL_OF`
_OPTIONAL = {"text_encoder", "vae"}


def local_checkpoints(
    paths: Sequence[Path],
    parts: Collection[str] | None = None,
    say: Say | None = None,
    room: Path | None = None,
) -> tuple[Path, ...]:
    """The file or folder of each checkpoint. Of a repository only the models of `parts` (None: all) are downloaded that
    no file given by itself has. `say` hears before how much that is; None: no weights are downloaded, but their headers
    into the folder `room`, if there is one.

    Raises ExportError for what the hub does not have, or cannot be downloaded.
    """
    places = {path: inside_cache(path) for path in paths if not is_hub_name(path)}
    names = {path: parse_hub_name(path) for path in paths if path not in places}
    for path, name in names.items():
        if name.file is not None:
            places[path] = _fetched(name, needed, (), say, room)
    without = {expert_named(place) or _model_in(place) for place in places.values() if place.is_file()}
    if parts is not None:
        without |= _OPTIONAL - {MODEL_OF[part] for part in parts}
    for path, name in names.items():
        if name.file is None:
            places[path] = _fetched(name, needed, without, say, room)
    return tuple(places[path] for path in paths)


def local_loras(loras: Sequence[LoraFile | tuple[str | Path, float]], say: Say | None = None) -> tuple[LoraFile, ...]:
    """The same for LoRAs. Raises ExportError."""
    return tuple(LoraFile(_lora(Path(path), say), strength) for path, strength in loras)


def _lora(path: Path, say: Say | None) -> Path:
    if not is_hub_name(path):
        return inside_cache(path)
    return _fetched(parse_hub_name(path), lambda hollow, name, _: needed_of_lora(hollow, name), (), say)


def _fetched(
    name: HubName,
    choose: Callable[[Path, HubName, Collection[str]], list[str]],
    without: Collection[str],
    say: Say | None,
    room: Path | None = None,
) -> Path:
    """The file that `name` names, or the folder of its repository, with all in it that `choose` chooses."""
    index = [name.file] if name.file is not None and name.file.endswith(".index.json") else []
    repository = Repository(name, [*DOCUMENTS, *index])
    with tempfile.TemporaryDirectory(prefix="tmd-hub-") as folder:
        hollow = Path(folder) / name.repo.rpartition("/")[2]
        lay_hollow(hollow, repository.sizes, repository.folder)
        try:
            files = choose(hollow, name, without)
        except ExportError as error:
            raise ExportError(str(error).replace(str(hollow), str(repository))) from None
    if say is not None:
        repository.download(files, say)
    elif (absent := repository.absent(files)) and room is not None:
        folder_of_headers = with_headers(repository, files, room)
        return folder_of_headers / name.file if name.file is not None else folder_of_headers
    elif absent:
        raise ExportError(
            f"{name} is not on this machine: {absent} would have to be downloaded first. Export it, or download it "
            f"with `hf download {name.repo} {' '.join(files[:6])}{' ...' if len(files) > 6 else ''}`."
        )
    return repository.folder / name.file if name.file is not None else repository.folder


def _model_in(file: Path) -> str:
    """What a file holds, of `parts.MODEL_OF`; "" for what is no part of Wan: its own source knows it."""
    try:
        part = Checkpoint(find(file).weights[0].open()).part
    except (ExportError, IndexError):
        return ""
    return _OF_FILE.get(part, part)
