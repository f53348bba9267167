"""Where a result goes: a file or folder that appears under its name when it is complete, and not before.

Everything is written under a temporary name beside the target and renamed at the end; after an error or Ctrl-C
nothing is left, and what stood there before is still there.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from ..errors import RuntimeFailure

FRAME_NAME = "frame_{:04d}.png"
_OUR_FRAME = re.compile(r"frame_\d{4,}\.png")


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
        # directory.
        place = self._final if self._fill else self._final.parent
        try:
            if is_folder:
                self.temporary = Path(tempfile.mkdtemp(prefix=".tmd-", suffix=".part", dir=place))
            else:
                handle, name = tempfile.mkstemp(prefix=".tmd-", suffix=".part", dir=place)
                os.close(handle)
                self.temporary = Path(name)
            # tempfile makes things for their owner alone; a video is a file like any other.
            os.chmod(self.temporary, (0o777 if is_folder else 0o666) & ~_umask())
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
        except OSError as error:  # a name too long, a folder that may not be entered
            raise cannot_write(self.path, error) from error
        if self._fill:
            other = [
                name for name in os.listdir(self._final) if not name.startswith(".") and not _OUR_FRAME.fullmatch(name)
            ]
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
            if self._fill:
                self._replace_frames()
            else:
                os.replace(self.temporary, self._final)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        finally:
            self.discard()

    def _replace_frames(self) -> None:
        new = sorted(os.listdir(self.temporary))
        for name in new:
            os.replace(self.temporary / name, self._final / name)
        for name in os.listdir(self._final):
            if _OUR_FRAME.fullmatch(name) and name not in new:
                os.remove(self._final / name)

    def discard(self) -> None:
        """Remove what was written so far; after `commit` there is nothing to remove."""
        if self._is_folder:
            shutil.rmtree(self.temporary, ignore_errors=True)
        else:
            self.temporary.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> RuntimeFailure:
    reason = (error.strerror or str(error)).lower()
    return RuntimeFailure(f"cannot write {path}: {reason}. Choose another place, or make room there.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
