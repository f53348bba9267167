"""A picture file -> the latents that a run starts from.

Files are decoded by FFmpeg (PyAV), by the one decoder that their first bytes name: no container, playlist or address
inside a file is ever followed.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from tmd_engines.cost.system_memory import available_bytes
from tmd_engines.cost.tiling import tile_size
from tmd_engines.errors import one_line

from ..clock import check_finite
from ..errors import RuntimeFailure, UsageFailure
from .tiles import encode_tiles

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tmd_engines import Engine, Manifest

    from ..clock import Timings

_DECODERS = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "mjpeg",
    b"RIFF": "webp",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
}
"""First bytes of a file -> FFmpeg's decoder for it."""

_MOST_PIXELS = 1 << 28  # 16384 x 16384, 800 MB as RGB
_MOST_BYTES = 1 << 30  # 16384 x 16384 of BMP in 32 bits
# A few hundred bytes can claim to be as many. No format here packs more pixels into a byte than PNG does of 1 bit each.
_PIXELS_PER_BYTE, _ALWAYS_PIXELS = 8300, 1 << 22
_BYTES_PER_PIXEL = 24  # as FFmpeg has it (16 at most), as RGBA, as RGB
_STRIP = 256  # rows that are put over white at once


def read_picture(path: str | Path) -> NDArray[np.uint8]:
    """The picture in a file, uint8 `[H, W, 3]`: PNG, JPEG, WebP, BMP or TIFF, turned as a camera says, over white where
    it is transparent. Raises RuntimeFailure if it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise RuntimeFailure(f"{path} {'is no file' if path.exists() else 'does not exist'}: name a picture.")
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise RuntimeFailure(f"{path} cannot be read ({error.strerror}): name a picture.") from error
    if len(data) > _MOST_BYTES:
        raise RuntimeFailure(f"{path} is larger than {_MOST_BYTES >> 30} GB: make it smaller.")
    return decode_picture(data, str(path))


def decode_picture(data: bytes, called: str, most_pixels: int = _MOST_PIXELS) -> NDArray[np.uint8]:
    """The picture in the bytes of a file, as `read_picture`; messages call it `called`.

    More than `most_pixels` are refused before memory for them is taken. Raises RuntimeFailure.
    """
    import av

    name = next((name for start, name in _DECODERS.items() if data.startswith(start)), None)
    if name is None:
        raise RuntimeFailure(f"{called} is no picture that can be read here: save it as PNG, JPEG, WebP, BMP or TIFF.")
    most = min(_most_pixels(len(data)), most_pixels)
    try:
        decoder: Any = av.CodecContext.create(name, "r")
        # Compared with the size in the picture's header, before memory for it is taken.
        decoder.options = {"max_pixels": str(most)}
        frame = [*decoder.decode(av.Packet(data)), *decoder.decode(None)][0]
        # In several threads FFmpeg writes over the first pixels of the next thread's rows, now and then.
        rgba = np.rot90(frame.to_ndarray(format="rgba", threads=1), frame.rotation // 90)
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise RuntimeFailure(
            f"{called} is damaged, or no {name} picture of at most {most / 1e6:.4g} megapixels, which is what its "
            f"{len(data)} bytes and the free memory allow ({one_line(error)}): save it again, or smaller."
        ) from error
    except MemoryError as error:
        raise RuntimeFailure(f"there is not enough memory for the picture {called}: save it smaller.") from error
    del frame
    return _over_white(rgba)


def _most_pixels(file_bytes: int) -> int:
    """How large a picture in a file of so many bytes may be, by what such a file can hold and by the free memory."""
    free = available_bytes()
    memory = _MOST_PIXELS if free is None else free // _BYTES_PER_PIXEL
    return max(min(_MOST_PIXELS, file_bytes * _PIXELS_PER_BYTE + _ALWAYS_PIXELS, memory), 1)


def _over_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB of RGBA over white, in strips: the shares of a whole picture would take 12 bytes a pixel, several times."""
    picture = np.ascontiguousarray(rgba[..., :3])
    for top in range(0, len(rgba), _STRIP):
        alpha = rgba[top : top + _STRIP, :, 3:]
        if (alpha < 255).any():
            share = alpha / np.float32(255)
            picture[top : top + _STRIP] = np.round(picture[top : top + _STRIP] * share + 255 * (1 - share))
    return picture


def start_size(
    manifest: Manifest,
    size: tuple[int, int] | None,
    image: NDArray[np.uint8] | None = None,
    init_latents: NDArray[Any] | None = None,
) -> tuple[int, int] | None:
    """(width, height) in pixels of a run: `size` if it is given, that of the latents, or the shape of the picture with
    about as many pixels as the model was made for; None: the model's own."""
    stride = manifest.latents.spatial_stride
    if size is None and init_latents is not None:
        return init_latents.shape[-1] * stride, init_latents.shape[-2] * stride
    if size is None and image is not None:
        check_picture(image)
        height, width = image.shape[:2]
        scale = (manifest.video.width * manifest.video.height / (width * height)) ** 0.5
        _, tall, wide = (stride * patch for patch in manifest.model.patch_size)
        return max(round(width * scale / wide), 1) * wide, max(round(height * scale / tall), 1) * tall
    return size


def check_picture(image: NDArray[Any]) -> None:
    """Raises UsageFailure unless `image` is uint8 `[H, W, 3]`."""
    if not isinstance(image, np.ndarray):
        raise UsageFailure(f"a picture must be a numpy array, uint8 [height, width, 3], not {type(image).__name__}.")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype.name != "uint8" or 0 in image.shape:
        raise UsageFailure(f"a picture must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}.")


def fit(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """uint8 `[height, width, 3]`: the middle of `image` that has this shape, scaled by Lanczos' filter, to an 8th or
    less after an average of whole pixels. A picture that has the size stays as it is."""
    scale = max(width / image.shape[1], height / image.shape[0])
    wide, tall = (max(round(side / scale), 1) for side in (width, height))
    left, top = (image.shape[1] - wide) // 2, (image.shape[0] - tall) // 2
    cut = image[top : top + tall, left : left + wide]
    if (wide, tall) == (width, height):
        return np.ascontiguousarray(cut)
    # FFmpeg's filter loses its precision when it is very long: 200 becomes 214 at a 60th of the size.
    step = int(1 / scale / 4)
    if step > 1:
        top, left = tall % step // 2, wide % step // 2
        rows, columns = tall // step, wide // step
        blocks = cut[top : top + rows * step, left : left + columns * step].reshape(rows, step, columns, step, 3)
        cut = np.round(blocks.mean(axis=(1, 3), dtype=np.float32)).astype(np.uint8)
    import av

    def resized(plane: NDArray[np.uint8]) -> Any:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(plane), format="gray")
        scaled = frame.reformat(width=width, height=height, format="gray", interpolation="LANCZOS", threads=1)
        return scaled.to_ndarray()

    # Each colour by itself: FFmpeg would scale a picture of colours by way of YUV.
    return np.stack([resized(cut[..., colour]) for colour in range(3)], axis=-1)


def encode_picture(
    load: Callable[[], Engine],
    manifest: Manifest,
    image: NDArray[np.uint8],
    size: tuple[int, int] | None,
    timings: Timings,
) -> NDArray[np.float32]:
    """Latents `[1, C, 1, h, w]` of `image` at `size` (see `start_size`), by the engine of the graph `encoder`; of a
    large still tile by tile.

    Raises UsageFailure for an array that is no picture and a size that has no latents, RuntimeFailure for NaN or Inf.
    """
    check_picture(image)
    size, stride = start_size(manifest, size, image) or (0, 0), manifest.latents.spatial_stride
    if any(side < stride or side % stride for side in size):
        raise UsageFailure(f"a picture of {size[0]}x{size[1]} cannot be encoded: choose multiples of {stride}.")
    height, width = size[1] // stride, size[0] // stride
    engine = load()
    tile = tile_size(height, width, stride) if manifest.family.makes_stills else (height, width)
    dims = {"batch": 1, "frames": 1, "height": tile[0], "width": tile[1]}
    frames, latents = engine.empty("frames", **dims), engine.empty("latents", **dims)
    with timings.stage("load"):  # an engine may compile where it is bound
        run = engine.bind({"frames": frames}, {"latents": latents})
    start = perf_counter()

    def encode(cut: NDArray[np.uint8]) -> NDArray[np.float32]:
        frames[...] = cut[None, None]
        run()
        return np.asarray(latents)

    found = encode_tiles(encode, fit(image, *size), tile, stride, manifest.latents.channels)
    check_finite("encode", found)
    seconds = perf_counter() - start
    timings.add("encode", seconds)
    timings.report("encode", 1, 1, seconds)
    return found
