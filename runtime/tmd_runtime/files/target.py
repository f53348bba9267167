"""Where a result goes: a file or folder that appears under its name when it is complete, and not before.

Everything is written under a temporary name beside the target and renamed at the end; after an error or Ctrl-C
nothing is left, and what stood there before is still there. What a killed process left, `sweep` removes.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from tmd_engines import unfinished

from ..errors import RuntimeFailure

FRAME_NAME = "frame_{:04d}.png"
_OUR_FRAME = re.compile(r"frame_\d{4,}\.png")


class FolderPath(type(Path())):  # type: ignore[misc]
    """The path of a folder, whatever ending its name has."""


def named(path: str | Path) -> Path:
    """A path as somebody wrote it; with a slash behind it, it is a folder."""
    if isinstance(path, str) and path.endswith("/"):
        return FolderPath(path)
    return path if isinstance(path, Path) else Path(path)


class Target:
    """The file or folder `path` in the making. `temporary` is what to write into; then `commit` or `discard`.

    Raises RuntimeFailure if `path` cannot be written, before anything else happens.
    """

    def __init__(self, path: Path, is_folder: bool) -> None:
        self.path, self._is_folder = path, is_folder
        # Resolved now: a target that is a link must not be replaced by a file, and the working directory may change.
        self._final = Path(os.path.realpath(path))
        self._fill = is_folder and os.path.isdir(self._final)
        self._check_existing()
        # Into a folder that is there already, frames move one by one: it may be a mount or somebody's working
        # directory. Only if it holds a video is it exchanged as a whole, where that can be done.
        place = self._final if self._fill else self._final.parent
        self._exchange = self._fill and _can_exchange(self._final)
        try:
            if self._exchange:
                try:
                    self.temporary = unfinished.begin(self._final.parent, is_folder)
                    return
                except OSError:  # the folder above is not ours to write
                    self._exchange = False
            self.temporary = unfinished.begin(place, is_folder)
        except OSError as error:
            if not place.is_dir():
                raise RuntimeFailure(
                    f"cannot write {path}: the folder {path.parent} does not exist. Create it first."
                ) from error
            raise cannot_write(path, error) from error

    def _check_existing(self) -> None:
        try:
            os.lstat(self._final)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:  # a name too long, a folder that may not be entered, a NUL
            raise cannot_write(self.path, error) from error
        if self._fill:
            try:
                names = os.listdir(self._final)
            except OSError as error:
                raise cannot_write(self.path, error) from error
            other = [name for name in names if not name.startswith(".") and not _OUR_FRAME.fullmatch(name)]
            if other:
                raise RuntimeFailure(
                    f"cannot write frames into {self.path}: it holds other files, such as {min(other)!r}. "
                    "Name a new or an empty folder."
                )
        elif self._is_folder or not self._final.is_file():
            kind = "folder" if self._is_folder else "file"
            raise RuntimeFailure(
                f"cannot write {self.path}: this name is taken by something that is no {kind}. Choose another."
            )

    def commit(self) -> None:
        """Give the finished result its name, in place of what had it before."""
        try:
            if self._exchange and self._exchanged():
                return
            if self._fill:
                self._replace_frames()
            else:
                os.replace(self.temporary, self._final)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        finally:
            self.discard()

    def _exchanged(self) -> bool:
        """One step: the folder of frames has the name, and what had it has the temporary one. False: not here."""
        with suppress(OSError):
            status = self._final.stat()
            os.chmod(self.temporary, status.st_mode & 0o7777)
            os.chown(self.temporary, status.st_uid, status.st_gid)
        return unfinished.exchange(self.temporary, self._final)

    def _replace_frames(self) -> None:
        """Frame by frame. The old video has left before the first frame of the new one comes: never a mixture."""
        new = sorted(os.listdir(self.temporary))
        old = [name for name in os.listdir(self._final) if _OUR_FRAME.fullmatch(name)]
        aside = unfinished.begin(self._final, is_folder=True) if old else self._final
        moved: list[str] = []
        try:
            for name in old:
                os.replace(self._final / name, aside / name)
            for name in new:
                os.replace(self.temporary / name, self._final / name)
                moved.append(name)
        except BaseException:
            for name in moved:
                os.replace(self._final / name, self.temporary / name)
            for name in os.listdir(aside) if old else ():
                os.replace(aside / name, self._final / name)
            raise
        finally:
            if old:
                unfinished.discard(aside)

    def discard(self) -> None:
        """Remove what was written so far; after `commit` there is nothing to remove."""
        unfinished.discard(self.temporary)


def write_text(path: Path, text: str) -> None:
    """A file of this text, complete or not there. Raises RuntimeFailure."""
    target = Target(path, is_folder=False)
    try:
        target.temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        target.discard()
        raise cannot_write(path, error) from error
    target.commit()


def _can_exchange(folder: Path) -> bool:
    """Whether another folder may take the name of this one: it holds a video and no hidden files, it is no mount and
    not where we are."""
    with suppress(OSError):
        names = os.listdir(folder)
        plain = bool(names) and all(_OUR_FRAME.fullmatch(name) for name in names)
        return plain and not os.path.ismount(folder) and not os.path.samefile(folder, ".")
    return False


def cannot_write(path: Path, error: Exception) -> RuntimeFailure:
    reason = (getattr(error, "strerror", None) or str(error)).lower()
    return RuntimeFailure(f"cannot write {path}: {reason}. Choose another place, or make room there.")
