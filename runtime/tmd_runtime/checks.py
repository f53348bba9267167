"""What a pipeline refuses, each with a message that says why and what to do."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tmd_engines.utf8 import NOT_UTF_8, is_utf8

from .clock import is_finite
from .errors import RuntimeFailure, UsageFailure
from .sampling.family import FIRST_FRAME, NO_PICTURE
from .text.encoder import EMBEDS_INSTEAD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from .settings import Settings

_NEEDED_FOR = {
    "encoder": "start from a picture",
    "text_encoder": "read a prompt",
    "backbone": "denoise",
    "flow_head": "denoise",
    "backbone_2": "denoise to the end",
    "flow_head_2": "denoise to the end",
    "update": "denoise",
    "decoder_first": "turn latents into frames",
    "decoder_step": "turn latents into more than one frame",
}
_INSTEAD = {
    "encoder": "It can start from the latents of one (--init-latents FILE). ",
    "text_encoder": EMBEDS_INSTEAD,
    "backbone": "It can still read a prompt (--save-embeds FILE). ",
    "flow_head": "It can still read a prompt (--save-embeds FILE). ",
    "backbone_2": "It can still read a prompt (--save-embeds FILE). ",
    "flow_head_2": "It can still read a prompt (--save-embeds FILE). ",
    "update": "It can still read a prompt (--save-embeds FILE). ",
    "decoder_first": "It can still save latents for a bundle that can (--save-latents FILE). ",
    "decoder_step": "It can still save latents for a bundle that can (--save-latents FILE). ",
}

_PARTS = {"update": "flow_head"}  # a part of an export that brings another graph as well


def missing_graph(name: str) -> RuntimeFailure:
    return RuntimeFailure(
        f"this bundle has no graph {name}, so it cannot {_NEEDED_FOR[name]}. {_INSTEAD[name]}"
        f"Export it again with {_PARTS.get(name, name)} among --parts, or use another bundle."
    )


def check_arrays(**arrays: object) -> None:
    """Raises UsageFailure unless each is an array of real numbers, or None."""
    for name, values in arrays.items():
        kind = getattr(getattr(values, "dtype", None), "kind", None)
        if values is not None and (kind not in ("f", "i", "u") or not hasattr(values, "ndim")):
            raise UsageFailure(f"{name} must be a numpy array of numbers, not {_kind(values)}.")


def check_prompt(prompt: object) -> None:
    """Raises UsageFailure unless a prompt is a text that can be written as UTF-8."""
    if not isinstance(prompt, str):
        raise UsageFailure(f"a prompt must be a text, not {_kind(prompt)}.")
    if not is_utf8(prompt):
        raise UsageFailure(f"the prompt {NOT_UTF_8}")


def check_hooks(*hooks: object) -> None:
    """Raises UsageFailure unless each is a function, or None."""
    for hook in hooks:
        if hook is not None and not callable(hook):
            raise UsageFailure(f"a callback must be a function, not {_kind(hook)}.")


def _kind(value: object) -> str:
    dtype = getattr(value, "dtype", None)
    return f"{type(value).__name__}" if dtype is None else f"{type(value).__name__} of {dtype}"


def check_embeds(positive: NDArray[Any], negative: NDArray[Any] | None, width: int) -> None:
    """Raises RuntimeFailure unless the embeddings of a prompt are `[1, text, width]`, and those of none the same;
    UsageFailure for NaN or Inf in them."""
    check_arrays(prompt_embeds=positive, negative_embeds=negative)
    if positive.ndim != 3 or positive.shape[0] != 1 or positive.shape[2] != width:
        raise RuntimeFailure(f"prompt_embeds must be [1, text, {width}] for this bundle, not {list(positive.shape)}.")
    if negative is not None and negative.shape != positive.shape:
        raise RuntimeFailure(
            f"negative_embeds must have the shape of prompt_embeds, {list(positive.shape)}, not {list(negative.shape)}."
        )
    for embeds in (positive, negative):
        if embeds is not None and not is_finite(embeds):
            raise UsageFailure("the embeddings hold NaN or Inf: encode the prompt again.")


def check_latents(latents: NDArray[Any], channels: int) -> None:
    """Raises RuntimeFailure unless `latents` can be decoded: `[1, channels, frames, height, width]`."""
    check_arrays(latents=latents)
    if latents.ndim != 5 or latents.shape[:2] != (1, channels) or 0 in latents.shape:
        raise RuntimeFailure(
            f"latents must be [1, {channels}, frames, height, width] for this bundle, not {list(latents.shape)}."
        )


def check_start(
    use: str | None, settings: Settings, init: NDArray[Any] | None, image: NDArray[Any] | None = None
) -> None:
    """Raises UsageFailure unless a picture, as latents or as an image (None: no picture), goes with the settings and
    with what the model makes of pictures, `use` (`RuntimeFamily.takes_picture`)."""
    check_arrays(init_latents=init)
    if init is not None and image is not None:
        raise UsageFailure("a run starts from one picture: give the image or its latents, not both.")
    pictured = init is not None or image is not None
    if not pictured and settings.strength is not None:
        raise UsageFailure(
            "a strength says how much of a picture changes, and there is none: give its latents, or the image."
        )
    if pictured and use is None:
        raise UsageFailure(NO_PICTURE)
    if pictured and use == FIRST_FRAME and settings.frames == 1:
        raise UsageFailure("a video of one frame would be the picture itself: choose more frames, such as 81.")
    if pictured and use != FIRST_FRAME and settings.strength is None:
        raise UsageFailure("to start from a picture, choose a strength: 0.3 changes little of it, 1 everything.")
    batch, channels, _, height, width = settings.latent_shape
    if init is not None and init.shape != (batch, channels, 1, height, width):
        raise UsageFailure(
            f"the picture's latents are {list(init.shape)}, and this run takes {[batch, channels, 1, height, width]}: "
            "leave the size out, or choose the picture's."
        )
    if init is not None and not is_finite(init):
        raise UsageFailure("the picture's latents hold NaN or Inf: encode the picture again.")


def check_condition(settings: Settings, prompt: str, has_embeds: bool = False) -> None:
    """Raises UsageFailure for a prompt, or its embeddings, beside a class."""
    if settings.label is not None and (prompt or has_embeds):
        raise UsageFailure("this model draws numbered classes and takes no prompt: leave the prompt out.")


def check_preview(settings: Settings, memory: str) -> None:
    """Raises a failure if a run cannot show what it would give at once."""
    if settings.deadline is not None:
        raise UsageFailure(
            "previews take time that a deadline cannot plan with: leave the preview or the deadline out."
        )
    if memory == "low":
        raise RuntimeFailure(
            "a preview needs the decoder beside the model, and only one stage after the other fits here (or was asked "
            "for, with --memory low): leave the preview out, or choose --memory all."
        )


@contextmanager
def memory_failure(settings: Settings) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise RuntimeFailure(
            f"there is not enough memory for {settings.frames} frames of {settings.width}x{settings.height}. "
            "Choose fewer frames or a smaller size."
        ) from error
