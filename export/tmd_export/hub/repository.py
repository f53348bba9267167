"""One commit of a repository on the hub, asked for and downloaded through `huggingface_hub`.

The library keeps its cache, takes HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and the user's token from where it always does,
keeps the files that are complete and goes on within one when a connection breaks.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tmd_engines.bundle.reader import format_size
from tmd_engines.errors import one_line, quote

from ..errors import ExportError
from .name import HubName, is_plain

Say = Callable[[str], None]

_MAX_FILES = 50_000
_INSTALL = "pip install '.[hub]' in tmd's checkout"
_CLIENTS = ("httpx", "httpx2", "requests")  # whose errors the library lets through


def silent(_: str) -> None:
    """For `say`: not a word, and no bars."""


class Repository:
    """The files of `name` at the commit that its revision is now; without a network, at the one that it was when it was
    downloaded."""

    def __init__(self, name: HubName, documents: Iterable[str]) -> None:
        """Asks what there is, and downloads those of `documents` that there are. Raises ExportError."""
        self.name = name
        with _in_our_words(name):
            import huggingface_hub

            self._revision: Any = huggingface_hub.HfApi().resolve_revision(name.repo, revision=name.revision)
            with _silently():
                self.folder = self._take(documents)
            self.sizes = self._listed()
        if len(self.sizes) > _MAX_FILES or not all(map(is_plain, self.sizes)):
            raise ExportError(f"{name} has more than {_MAX_FILES} files, or one whose name leads out of it: not read.")

    def __str__(self) -> str:
        return str(HubName(self.name.repo, self._revision.resolved))

    def download(self, files: Sequence[str], say: Say) -> None:
        """Brings `files` into `folder`, and says before how much that is. Raises ExportError."""
        absent = [file for file in files if not (self.folder / file).is_file()]
        if not absent:
            return
        self._sweep()
        total, size = (sum(self.sizes[file] for file in some) for some in (files, absent))
        cache = self.folder.parents[2]
        free = shutil.disk_usage(cache).free
        what = f"{self}: {_counted(files)}, {format_size(total)}; {format_size(size)} to download"
        if size > free:
            raise ExportError(
                f"{what}, and {format_size(free)} are free in {cache}: free some space, or set HF_HOME to a folder "
                "on a larger disk."
            )
        say(f"{what} into {cache}.")
        shown = say is not silent and sys.stderr.isatty()
        with _in_our_words(self.name), nullcontext() if shown else _silently():
            self._take(files)

    def header(self, file: str) -> Any:
        """What a safetensors file says of its tensors, asked for with a range; see `huggingface_hub`'s
        `SafetensorsFileMetadata`. Raises ExportError."""
        from huggingface_hub import HfApi, errors

        with _in_our_words(self.name):
            try:
                return HfApi().parse_safetensors_file_metadata(self.name.repo, file, revision=self._revision.resolved)
            except errors.SafetensorsParsingError as error:
                raise ExportError(f"{file} of {self} is no safetensors file ({quote(one_line(error), 200)}).") from None

    def absent(self, files: Sequence[str]) -> str | None:
        """What `download` would have to bring, as a part of a sentence; None if all is there."""
        absent = [file for file in files if not (self.folder / file).is_file()]
        size = sum(self.sizes[file] for file in absent)
        return f"{_counted(absent)}, {format_size(size)} ({', '.join(absent[:6])})" if absent else None

    def _listed(self) -> dict[str, int]:
        """Bytes of each file, as the hub lists them; without a network, and where an older version of the library made
        the cache, of those that are there."""
        from huggingface_hub import errors, get_cached_repo_tree

        try:
            files = get_cached_repo_tree(self.name.repo, revision=self._revision)
        except errors.CachedRepoTreeNotFoundError:
            there = (path for path in self.folder.rglob("*") if path.is_file())
            return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in there}
        return {file.path: file.size for file in files}

    def _sweep(self) -> None:
        """Removes what is left of files whose download was killed: the library begins those anew, and never ends these.

        A file that somebody is downloading now is locked, and stays.
        """
        from filelock import FileLock, Timeout

        root = self.folder.parents[1]
        locks = root.parent / ".locks" / root.name
        for path in (root / "blobs").glob("*.incomplete"):
            locks.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout, OSError), FileLock(locks / f"{path.name.partition('.')[0]}.lock", timeout=0):
                path.unlink(missing_ok=True)

    def _take(self, files: Iterable[str]) -> Path:
        from huggingface_hub import snapshot_download

        wanted = [glob.escape(file) for file in files]
        return Path(snapshot_download(self.name.repo, revision=self._revision, allow_patterns=wanted))


def _counted(files: Sequence[str]) -> str:
    return f"{len(files)} file{'' if len(files) == 1 else 's'}"


@contextmanager
def _silently() -> Iterator[None]:
    """Without the library's bars and warnings: a repository need not have any of the documents."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    shown, verbosity = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            enable_progress_bars()


@contextmanager
def _in_our_words(name: HubName) -> Iterator[None]:
    """Turns what the hub and its library can answer into ExportError."""
    try:
        yield
    except ImportError as error:
        if error.name != "huggingface_hub":
            raise
        raise ExportError(f"{name} is on the hub, which needs the package huggingface_hub: {_INSTALL}") from None
    except Exception as error:
        reason = _reason(name, error)
        if reason is None:
            raise
        raise ExportError(reason) from None


def _reason(name: HubName, error: Exception) -> str | None:
    """The sentence for an error of the library; None for one that is not the hub's."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # what the hub said to the first question about a file
    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{name.repo}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: agree to its terms at {page}, then {log_in}, and start again."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name.repo} has no revision {quote(name.revision or 'main')}: give a branch, a tag or a commit of it."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no {page}, or it is private: check the name. If it is private, {log_in}."
    offline = (
        errors.OfflineModeIsEnabled,
        errors.RevisionResolutionError,
        errors.LocalEntryNotFoundError,
        errors.CachedRepoTreeNotFoundError,
    )
    if isinstance(error, offline):
        return (
            f"{name} is not complete in the cache, and the hub cannot be reached (HF_HUB_OFFLINE is set, there is no "
            f"network, or HF_ENDPOINT is wrong): {quote(one_line(error), 300)}. Go online and start again: what is "
            "complete stays."
        )
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS:
        return f"the download of {name} failed ({quote(one_line(error), 300)}): start again, what is complete stays."
    return None
