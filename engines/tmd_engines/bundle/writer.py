"""Writing a bundle so that it appears under its name complete, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import unfinished
from ..errors import BundleError
from .files import file_size, open_regular, sha256_hex
from .manifest import MANIFEST_NAME
from .reader import Bundle


class BundleWriter:
    """Collects the files of a bundle in a temporary folder beside the target, which gets the name when all is checked.

        with BundleWriter("my-bundle") as writer:
            export_graphs_into(writer.folder)
            bundle = writer.commit(manifest)      # the manifest as a dict, without "files"

    Leaving the block without `commit` (an exception, Ctrl-C) removes the temporary folder and leaves the target as it
    was. `overwrite` replaces an existing bundle; a folder that is not a bundle is never replaced, unless it is empty.
    At every moment one of the two is whole under the name, where the system can exchange names (Linux, macOS). Where it
    cannot, a process that is killed between two renames leaves the old one aside, and the next writer puts it back.
    """

    folder: Path  # what to write into; inside the block

    def __init__(self, out_dir: str | Path, overwrite: bool = False) -> None:
        # Not resolved: if the target is a link, the rename must meet the link, and _check_target refuses it.
        self.target = Path(os.path.abspath(out_dir))
        self.overwrite = overwrite
        self._aside = self.target.with_name(f"{unfinished.PREFIX}{self.target.name}.old")

    def __enter__(self) -> BundleWriter:
        """Makes `folder`. Raises BundleError if the target is taken or its parent cannot be written."""
        try:
            self._recover()
            self._check_target()
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.folder = unfinished.begin(self.target.parent, is_folder=True)
        except OSError as error:
            raise BundleError(f"{self.target.parent} cannot be written: {error}. Choose another --out.") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        unfinished.discard(self.folder)  # after a commit: nothing, or what had the name before

    def commit(self, manifest: Mapping[str, Any]) -> Bundle:
        """Makes the folder a bundle under its name, and returns it. Raises BundleError; the target is then untouched.

        Adds "files" to `manifest` (size and sha256 of everything in `folder`), writes it, checks the result as every
        reader does (`Bundle.open`), and renames the folder. Call it once.
        """
        document = {**manifest, "files": {}}
        try:
            readable = (
                self.folder.stat().st_mode & 0o666
            )  # what the user's umask gives; some writers make files private
            for path in sorted(self.folder.iterdir()):
                with open_regular(self.folder, path.name) as file:
                    document["files"][path.name] = {"size": file_size(file), "sha256": sha256_hex(file)}
                    os.fsync(file.fileno())
                path.chmod(readable)
            text = json.dumps(document, indent=2, allow_nan=False)
            with open(self.folder / MANIFEST_NAME, "x", encoding="utf-8") as out:
                out.write(text + "\n")
                out.flush()
                os.fsync(out.fileno())
        except (TypeError, ValueError) as error:
            raise BundleError(f"The manifest for {self.target} cannot be written as JSON: {error}.") from None
        except OSError as error:
            raise BundleError(
                f"{self.folder} cannot be completed: {error}. Free some space, or choose another --out."
            ) from None
        checked = Bundle.open(self.folder)
        self._move_into_place()
        return Bundle(self.target, checked.manifest)

    def _check_target(self) -> None:
        if not os.path.lexists(self.target):
            return
        if self.target.is_symlink() or not self.target.is_dir():
            raise BundleError(f"{self.target} exists and is not a folder: choose another --out.")
        if (self.target / MANIFEST_NAME).is_file():
            if not self.overwrite:
                raise BundleError(f"{self.target} exists already: choose another --out, or add --overwrite.")
        elif any(self.target.iterdir()):
            # Overwriting must never mean deleting somebody's home folder.
            raise BundleError(f"{self.target} exists, and is neither empty nor a bundle: choose another --out.")

    def _recover(self) -> None:
        """Puts back what a writer that was killed left aside, or removes it if its successor has the name."""
        if self._aside.is_dir() and not self._aside.is_symlink():
            if os.path.lexists(self.target):
                shutil.rmtree(self._aside, ignore_errors=True)
            else:
                os.rename(self._aside, self.target)

    def _move_into_place(self) -> None:
        self._check_target()  # again: the export may have taken an hour
        try:
            _sync_folder(self.folder)
            occupied = self.target.exists() and any(self.target.iterdir())
            if not occupied:
                os.rename(self.folder, self.target)
            elif not unfinished.exchange(self.folder, self.target):
                self._move_by_way_of_aside()
            _sync_folder(self.target.parent)
        except OSError as error:
            raise BundleError(f"{self.target} cannot be put in place: {error}. Check its permissions.") from None

    def _move_by_way_of_aside(self) -> None:
        os.rename(self.target, self._aside)  # a folder with content cannot be replaced in one step
        try:
            os.rename(self.folder, self.target)
        except BaseException:
            os.rename(self._aside, self.target)
            raise
        shutil.rmtree(self._aside, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable where the system can (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
