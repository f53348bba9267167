"""The formats of a video file, one class each: what `video.py` writes into, in a thread of its own.

PyAV does the work and brings its own FFmpeg. It is imported here, and only when an encoder is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction
from math import isqrt
from typing import TYPE_CHECKING, Any, ClassVar

from tmd_engines.device.paths import utf8_name

from ..errors import RuntimeFailure, UsageFailure
from .png import png
from .tags import tags, with_comment
from .target import FRAME_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]

_SHEET_GAP = 2
_SHEET_SHADE = 255
_MOST_PIXELS = (2**31 - 1) // 8  # of one picture, with a border of 128: FFmpeg's av_image_check_size
# FFmpeg's numbers for BT.709 and for limited range ("MPEG"). Untagged files are read with BT.601 by some players:
# shifted colours.
_BT709, _LIMITED = 1, 1


class Encoder(ABC):
    """Writes one format to the path `file`. Runs in one thread only."""

    def __init__(self, file: Path, fps: int, texts: Mapping[str, str]) -> None:
        import_av()
        self._file, self._fps, self._texts = file, fps, texts

    @abstractmethod
    def add(self, frames: Frames) -> None:
        """Encode `[F, H, W, 3]`, or keep them if the format needs all frames at once."""

    @abstractmethod
    def close(self, complete: bool) -> None:
        """Finish the file, or just let go of it if it will be thrown away."""


class _StreamEncoder(Encoder):
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


class _Gif(Encoder):
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


class _ContactSheet(Encoder):
    """All frames in one PNG, in reading order, with small gaps; a single frame is the picture itself."""

    def __init__(self, file: Path, fps: int, texts: Mapping[str, str]) -> None:
        super().__init__(file, fps, texts)
        self._frames: list[Any] = []

    def add(self, frames: Frames) -> None:
        self._frames.extend(frames)
        check_sheet(len(self._frames), frames.shape[2], frames.shape[1])

    def close(self, complete: bool) -> None:
        if complete and self._frames:
            still = len(self._frames) == 1
            self._file.write_bytes(png(self._frames[0] if still else contact_sheet(self._frames), self._texts))


class _FrameFolder(Encoder):
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


ENCODERS: dict[str, type[Encoder]] = {
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
    columns, gap = _columns(len(frames)), _SHEET_GAP
    sheet_width, sheet_height = sheet_size(len(frames), width, height)
    sheet = np.full((sheet_height, sheet_width, 3), _SHEET_SHADE, np.uint8)
    for index, image in enumerate(frames):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def check_sheet(frames: int, width: int, height: int) -> None:
    """Raises UsageFailure if `frames` pictures of that size do not fit into one PNG."""
    sheet_width, sheet_height = sheet_size(frames, width, height)
    if frames > 1 and (sheet_width + 128) * (sheet_height + 128) >= _MOST_PIXELS:
        raise UsageFailure(
            f"a contact sheet of {frames} frames of {width}x{height} would have {sheet_width}x{sheet_height} pixels, "
            "more than a PNG can be written with here. Choose .mp4, .webm, or a name without an ending for a folder of "
            "PNG frames."
        )


def _columns(frames: int) -> int:
    return isqrt(frames - 1) + 1  # the root, rounded up


def sheet_size(frames: int, width: int, height: int) -> tuple[int, int]:
    """Width and height of the `contact_sheet` of frames of that size."""
    columns = _columns(frames)
    rows = -(-frames // columns)
    return columns * (width + _SHEET_GAP) + _SHEET_GAP, rows * (height + _SHEET_GAP) + _SHEET_GAP


def _first_codec(names: tuple[str, ...], container: str) -> str:
    import av

    for name in names:
        if name in av.codecs_available:
            return name
    raise RuntimeFailure(
        f"this PyAV has no encoder for .{container} ({', '.join(names)}). Install PyAV's wheel (pip install av), "
        "or choose another ending."
    )


def import_av() -> None:
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise RuntimeFailure(
            f"PyAV, which writes the files, cannot be imported ({error}). Install it: pip install av"
        ) from error
