"""Frames -> a file by its ending: .mp4 (H.264), .webm (VP9), .gif, .png (contact sheet; of one frame, the picture), or
a folder of PNG frames.

    with open_video("circle.mp4", fps=8) as video:
        for frames in pipeline.decode_chunks(latents):       # uint8 [F, H, W, 3]
            video.write(frames)                              # returns at once; a thread encodes

The file appears when the block ends well (`target.py`). Encoding is PyAV's, which brings its own FFmpeg; it is
imported here and only when a file is opened.
"""

from __future__ import annotations

import os
import queue
import threading
from abc import ABC, abstractmethod
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from tmd_engines.device.paths import utf8_name

from ..errors import RuntimeFailure, UsageFailure
from ..settings import MAX_FPS
from .png import png
from .tags import tags, with_comment
from .target import FRAME_NAME, FolderPath, Target, cannot_write, named

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]

_SHEET_GAP = 2
_SHEET_SHADE = 255
_QUEUED_PIECES = 2
_PATIENCE = 0.5  # seconds
_GIF_FPS = 50
# FFmpeg's numbers for BT.709 and for limited range ("MPEG"). Untagged files are read with BT.601 by some players:
# shifted colours.
_BT709, _LIMITED = 1, 1


def write_video(path: str | Path, frames: Frames, fps: int, texts: Mapping[str, str] | None = None) -> None:
    """Write `frames` uint8 `[F, H, W, 3]` (RGB) at `fps` frames per second to `path`. Raises as `open_video` does."""
    with open_video(path, fps, texts) as video:
        video.write(frames)


def check_target(path: str | Path) -> None:
    """Find out now whether `path` can be written later. Raises UsageFailure (unknown ending) or RuntimeFailure."""
    _open_target(named(path)).discard()


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
            _import_av()
        kind = _ENCODERS[_ending(path)]
        return VideoFile(target, lambda: kind(target.temporary, fps, {} if texts is None else texts))
    except BaseException:
        target.discard()
        raise


def _open_target(path: Path) -> Target:
    ending = _ending(path)
    if not ending and not isinstance(path, FolderPath) and path.name.lower() in _ENCODERS and not os.path.isdir(path):
        raise UsageFailure(f"cannot write {path}: that is an ending without a name. Write video{path.name}, say.")
    if ending not in _ENCODERS:
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

    def __init__(self, target: Target, open_encoder: Callable[[], _Encoder]) -> None:
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
            self._pieces.put(None)
            self._thread.join()
            if kind is None:
                self._raise_error()
                if self._is_empty:
                    raise RuntimeFailure(f"cannot write {self.path}: there is not one frame to write.")
                self._target.commit()
        except BaseException:
            # A second Ctrl-C: the thread still has the file open, and stops after the piece it is at.
            self._stop = True
            self._thread.join()
            raise
        finally:
            if self._stop or self._error is not None:
                self._target.discard()

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


class _Encoder(ABC):
    """Writes one format to the path `file`. Runs in one thread only."""

    def __init__(self, file: Path, fps: int, texts: Mapping[str, str]) -> None:
        _import_av()
        self._file, self._fps, self._texts = file, fps, texts

    @abstractmethod
    def add(self, frames: Frames) -> None:
        """Encode `[F, H, W, 3]`, or keep them if the format needs all frames at once."""

    @abstractmethod
    def close(self, complete: bool) -> None:
        """Finish the file, or just let go of it if it will be thrown away."""


class _StreamEncoder(_Encoder):
    """One stream in 4:2:0, as every player and browser takes it. Odd sizes get their last row or column twice."""

    container: ClassVar[str]
    codecs: ClassVar[tuple[str, ...]]
    options: ClassVar[dict[str, str]]
    container_options: ClassVar[dict[str, str]] = {}

    def __init__(self, file: Path, fps: int, texts: Mapping[str, str]) -> None:
        super().__init__(file, fps, texts)
        self._codec = _first_codec(self.codecs, self.container)
        self._output: Any = None
        self._stream: Any = None

    def add(self, frames: Frames) -> None:
        import av
        import numpy as np

        height, width = frames.shape[1:3]
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._output is None:
            self._open(frames.shape[2], frames.shape[1])
        for image in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
            self._output.mux(self._stream.encode(picture))

    def _open(self, width: int, height: int) -> None:
        import av

        self._output = av.open(utf8_name(self._file), "w", format=self.container, options=self.container_options)
        self._output.metadata.update(tags(self._texts))
        self._stream = self._output.add_stream(self._codec, rate=Fraction(self._fps), options=self.options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED

    def close(self, complete: bool) -> None:
        if self._output is None:
            return
        try:
            if complete:
                self._output.mux(self._stream.encode(None))
        finally:
            self._output.close()


class _Mp4(_StreamEncoder):
    container, codecs = "mp4", ("libx264", "libopenh264")
    options: ClassVar = {"crf": "16", "preset": "medium"}
    # The index first, so that a browser can start before it has the whole file.
    container_options: ClassVar = {"movflags": "+faststart"}


class _WebM(_StreamEncoder):
    container, codecs = "webm", ("libvpx-vp9",)
    options: ClassVar = {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "3", "row-mt": "1"}
    # Without it Matroska's muxer numbers each file at random.
    container_options: ClassVar = {"fflags": "+bitexact"}


class _Gif(_Encoder):
    """256 colours chosen for this video by FFmpeg's palettegen and paletteuse: all frames come first."""

    def __init__(self, file: Path, fps: int, texts: Mapping[str, str]) -> None:
        super().__init__(file, fps, texts)
        self._frames: list[Any] = []

    def add(self, frames: Frames) -> None:
        import av

        for image in frames:
            picture = av.VideoFrame.from_ndarray(image.copy(), format="rgb24")
            picture.pts, picture.time_base = len(self._frames), Fraction(1, self._fps)
            self._frames.append(picture)

    def close(self, complete: bool) -> None:
        if not complete or not self._frames:
            return
        import av

        width, height = self._frames[0].width, self._frames[0].height
        with av.open(utf8_name(self._file), "w", format="gif") as output:
            stream = output.add_stream("gif", rate=Fraction(self._fps))
            stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
            for picture in self._with_palette(width, height):
                output.mux(stream.encode(picture))
            output.mux(stream.encode(None))
        if self._texts:
            self._file.write_bytes(with_comment(self._file.read_bytes(), self._texts))

    def _with_palette(self, width: int, height: int) -> list[Any]:
        import av
        from av.error import EOFError as EndOfFrames
        from av.filter import Graph

        graph = Graph()
        source = graph.add_buffer(
            width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1, self._fps)
        )
        split, palette, use = (
            graph.add("split"),
            graph.add("palettegen", "reserve_transparent=0"),
            graph.add("paletteuse"),
        )
        sink = graph.add("buffersink")
        source.link_to(split)
        split.link_to(palette, 0, 0)
        split.link_to(use, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()
        for picture in [*self._frames, None]:
            source.push(picture)
        pictures = []
        try:
            while True:
                pictures.append(sink.pull())
        except EndOfFrames:
            return pictures


class _ContactSheet(_Encoder):
    """All frames in one PNG, in reading order, with small gaps; a single frame is the picture itself."""

    def __init__(self, file: Path, fps: int, texts: Mapping[str, str]) -> None:
        super().__init__(file, fps, texts)
        self._frames: list[Any] = []

    def add(self, frames: Frames) -> None:
        self._frames.extend(frames)

    def close(self, complete: bool) -> None:
        if complete and self._frames:
            still = len(self._frames) == 1
            self._file.write_bytes(png(self._frames[0] if still else contact_sheet(self._frames), self._texts))


class _FrameFolder(_Encoder):
    """Frames as frame_0000.png, frame_0001.png, ..."""

    def __init__(self, file: Path, fps: int, texts: Mapping[str, str]) -> None:
        super().__init__(file, fps, texts)
        self._count = 0

    def add(self, frames: Frames) -> None:
        for image in frames:
            (self._file / FRAME_NAME.format(self._count)).write_bytes(png(image, self._texts))
            self._count += 1

    def close(self, complete: bool) -> None:
        pass


_ENCODERS: dict[str, type[_Encoder]] = {
    ".mp4": _Mp4,
    ".webm": _WebM,
    ".gif": _Gif,
    ".png": _ContactSheet,
    "": _FrameFolder,
}


def contact_sheet(frames: Any) -> Frames:
    """All of `frames` (F arrays uint8 `[H, W, 3]`) in rows of about √F, as one uint8 image."""
    import numpy as np

    height, width = frames[0].shape[:2]
    columns = int(np.ceil(np.sqrt(len(frames))))
    rows = -(-len(frames) // columns)
    gap = _SHEET_GAP
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), _SHEET_SHADE, np.uint8)
    for index, image in enumerate(frames):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def _first_codec(names: tuple[str, ...], container: str) -> str:
    import av

    for name in names:
        if name in av.codecs_available:
            return name
    raise RuntimeFailure(
        f"this PyAV has no encoder for .{container} ({', '.join(names)}). Install PyAV's wheel (pip install av), "
        "or choose another ending."
    )


def _import_av() -> None:
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise RuntimeFailure(
            f"PyAV, which writes the files, cannot be imported ({error}). Install it: pip install av"
        ) from error
