"""Frames -> a file by its ending: .mp4 (H.264), .webm (VP9), .gif, .png (contact sheet; of one frame, the picture), or
a folder of PNG frames.

    with open_video("circle.mp4", fps=8) as video:
        for frames in pipeline.decode_chunks(latents):       # uint8 [F, H, W, 3]
            video.write(frames)                              # returns at once; a thread encodes

The file appears when the block ends well (`target.py`). The formats are in `encoders.py`.
"""

from __future__ import annotations

import os
import queue
import threading
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from ..errors import RuntimeFailure, UsageFailure
from ..settings import MAX_FPS
from .encoders import ENCODERS, Encoder, check_sheet, import_av
from .target import FolderPath, Target, cannot_write, named

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]

_QUEUED_PIECES = 2
_PATIENCE = 0.5  # seconds
_GIF_FPS = 50


def write_video(path: str | Path, frames: Frames, fps: int, texts: Mapping[str, str] | None = None) -> None:
    """Write `frames` uint8 `[F, H, W, 3]` (RGB) at `fps` frames per second to `path`. Raises as `open_video` does."""
    with open_video(path, fps, texts) as video:
        video.write(frames)


def check_target(path: str | Path) -> None:
    """Find out now whether `path` can be written later. Raises UsageFailure (unknown ending) or RuntimeFailure."""
    _open_target(named(path)).discard()


def check_form(path: str | Path, fps: int, frames: int, width: int, height: int) -> None:
    """Raises UsageFailure if the format of `path` cannot hold such a video, or `fps` is out of bounds."""
    ending = _ending(named(path))
    _check_fps(fps, ending)
    if ending == ".png":
        check_sheet(frames, width, height)


def open_video(path: str | Path, fps: int, texts: Mapping[str, str] | None = None) -> VideoFile:
    """A video file to write into, as a context manager.

    `fps` is a whole number of frames per second, 1 to 1000; a GIF takes at most 50. `texts`, by keyword, go into the
    file as they are when the first frame comes: into a PNG by themselves, into the others as `tags` says.
    Raises UsageFailure for an unknown ending or another `fps`, RuntimeFailure if `path` cannot be written or PyAV is
    not installed. What is wrong with PyAV itself is seen by a thread while the caller goes on, and raised by `check`
    or `write`.
    """
    path = named(path)
    _check_fps(fps, _ending(path))
    target = _open_target(path)
    try:
        if find_spec("av") is None:
            import_av()
        kind = ENCODERS[_ending(path)]
        return VideoFile(target, lambda: kind(target.temporary, fps, {} if texts is None else texts))
    except BaseException:
        target.discard()
        raise


def _open_target(path: Path) -> Target:
    ending = _ending(path)
    if not ending and not isinstance(path, FolderPath) and path.name.lower() in ENCODERS and not os.path.isdir(path):
        raise UsageFailure(f"cannot write {path}: that is an ending without a name. Write video{path.name}, say.")
    if ending not in ENCODERS:
        raise UsageFailure(
            f"cannot write {path}: the ending {path.suffix!r} is unknown. Choose .mp4, .webm, .gif, .png (contact "
            "sheet), or a name without an ending for a folder of PNG frames."
        )
    return Target(path, is_folder=not ending)


def _check_fps(fps: int, ending: str) -> None:
    if fps != int(fps) or not 1 <= fps <= MAX_FPS:
        raise UsageFailure(f"{fps} frames per second cannot be written: choose a whole number from 1 to {MAX_FPS}.")
    if ending == ".gif" and fps > _GIF_FPS:
        raise UsageFailure(
            f"a GIF of {fps} frames per second cannot be written: it counts in hundredths of a second, and programs "
            f"show a frame for 2 of them at least. Choose at most {_GIF_FPS}, or another format."
        )


def _ending(path: Path) -> str:
    # os.path.isdir is False, and no error, for a name that the system refuses; Target says what is wrong with it.
    return "" if isinstance(path, FolderPath) or os.path.isdir(path) else path.suffix.lower()


class VideoFile:
    """Takes pieces of a video and encodes them in a thread of its own, while the caller makes the next ones.

    `seconds` is the time that thread has worked; it runs beside the decoder, so it does not add to the duration of a
    run.
    """

    def __init__(self, target: Target, open_encoder: Callable[[], Encoder]) -> None:
        self.path = target.path
        self.seconds = 0.0
        self._target, self._open_encoder = target, open_encoder
        self._error: Exception | None = None
        self._stop = False
        self._is_empty = True
        self._begun = threading.Event()
        self._pieces: queue.Queue[Frames | None] = queue.Queue(_QUEUED_PIECES)
        self._thread = threading.Thread(target=self._work, name="video-file", daemon=True)
        self._thread.start()

    def write(self, frames: Frames) -> None:
        """Append `frames` uint8 `[F, H, W, 3]`, which must not change afterwards; waits if the encoder is far behind.

        Raises RuntimeFailure if an earlier piece could not be written, ValueError for other arrays.
        """
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype.name != "uint8" or 0 in frames.shape:
            raise ValueError(f"frames must be uint8 [F, H, W, 3], not {frames.dtype} {list(frames.shape)}")
        self._is_empty = False
        self._begun.set()
        if self._error is None:
            self._pieces.put(frames)
        self._raise_error()

    def check(self) -> None:
        """Raises RuntimeFailure if it is known by now that no piece can be written."""
        self._raise_error()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._stop = kind is not None
            self._begun.set()
            self._end_thread()
            if kind is None:
                self._raise_error()
                if self._is_empty:
                    raise RuntimeFailure(f"cannot write {self.path}: there is not one frame to write.")
                self._target.commit()
        except BaseException:
            # Ctrl-C: the thread still has the file open, and stops after the piece it is at. Whether it has been told
            # of the end by now depends on where the signal came.
            self._stop = True
            self._end_thread()
            raise
        finally:
            if self._stop or self._error is not None:
                self._target.discard()

    def _end_thread(self) -> None:
        if self._thread.is_alive():
            self._pieces.put(None)
            self._thread.join()

    def _raise_error(self) -> None:
        if isinstance(self._error, OSError):
            raise cannot_write(self.path, self._error) from self._error
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        encoder = None
        # PyAV takes long to import, and would hold back the threads that load graphs. What is wrong with it shall be
        # known long before a long run is over.
        self._begun.wait(_PATIENCE)
        try:
            encoder = self._open_encoder()
        except Exception as error:
            self._error = error
        # Pieces are taken off the queue even after an error, or the caller would wait for room in it for ever.
        while True:
            piece = self._pieces.get()
            start = perf_counter()
            try:
                if encoder is not None and piece is not None and not self._stop and self._error is None:
                    encoder.add(piece)
                if encoder is not None and piece is None:
                    encoder.close(complete=not self._stop and self._error is None)
            except Exception as error:
                self._error = self._error or error
            self.seconds += perf_counter() - start
            if piece is None:
                return
