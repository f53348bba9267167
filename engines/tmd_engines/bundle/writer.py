"""Writing a bundle so that it appears under its name complete, or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import BundleError
from .files import file_size, open_regular, sha256_hex
from .manifest import MANIFEST_NAME
from .reader import Bundle


class BundleWriter:
    """Collects the files of a bundle in a temporary folder beside the target, and renames it when all is checked.

        with BundleWriter("my-bundle") as writer:
            export_graphs_into(writer.folder)
            bundle = writer.commit(manifest)      # the manifest as a dict, without "files"

    Leaving the block without `commit` (an exception, Ctrl-C) removes the temporary folder and leaves the target as it
    was. `overwrite` replaces an existing bundle; a folder that is not a bundle is never replaced, unless it is empty.
    """

    def __init__(self, out_dir: str | Path, overwrite: bool = False) -> None:
        # Not resolved: if the target is a link, the rename must meet the link, and _check_target refuses it.
        self.target = Path(os.path.abspath(out_dir))
        self.overwrite = overwrite
        self.folder = self.target.with_name(f".{self.target.name}.{secrets.token_hex(4)}.partial")

    def __enter__(self) -> BundleWriter:
        """Makes `folder`. Raises BundleError if the target is taken or its parent cannot be written."""
        self._check_target()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir()
        except OSError as error:
            raise BundleError(f"{self.target.parent} cannot be written: {error}. Choose another --out.") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already after a commit

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

    def _move_into_place(self) -> None:
        self._check_target()  # again: the export may have taken an hour
        old = self.folder.with_suffix(".old")
        try:
            if self.target.exists():
                os.rename(self.target, old)  # a folder with content cannot be replaced in one step
            try:
                os.rename(self.folder, self.target)
            except BaseException:
                if old.exists():
                    os.rename(old, self.target)
                raise
        except OSError as error:
            raise BundleError(f"{self.target} cannot be put in place: {error}. Check its permissions.") from None
        shutil.rmtree(old, ignore_errors=True)
        _sync_folder(self.target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable where the system can (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
