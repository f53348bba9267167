"""The nodes. Each is one stage of a run, so that other nodes fit between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tmd_runtime
from tmd_engines.registry import engine_names
from tmd_runtime.memory import MODES
from tmd_runtime.sampling import family_of
from tmd_runtime.sampling.family import FIRST_FRAME
from tmd_runtime.settings import MAX_SEED, MAX_STEPS

from . import host, values

if TYPE_CHECKING:
    from tmd_runtime import Pipeline, Settings

BUNDLE = "TMD_BUNDLE"
_BUNDLE_INPUT = (BUNDLE, {"tooltip": "From Load bundle."})


def _whole(low: int, high: int, tooltip: str, default: int = 0, **more: Any) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": low, "max": high, "tooltip": tooltip, **more}


class TMDLoadBundle:
    """Opens a bundle. Its graphs are loaded by the stages that need them."""

    TITLE = "Load bundle (tmd)"
    CATEGORY = "tmd"
    RETURN_TYPES = (BUNDLE, "FLOAT")
    RETURN_NAMES = ("bundle", "fps")
    FUNCTION = "load"
    DESCRIPTION = "A few-step model that tmd-export made, from models/tmd, or one that comes with tmd."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"bundle": (list(host.bundles()), {"tooltip": "A folder in models/tmd, or builtin:NAME."})},
            "optional": {
                "engine": (list(engine_names()), {"default": "auto", "tooltip": "What computes the graphs."}),
                "memory": (list(MODES), {"default": "auto", "tooltip": "low: one stage after the other."}),
                "threads": _whole(0, 1024, "CPU threads; 0: as many as fit the model."),
            },
        }

    @classmethod
    def IS_CHANGED(cls, bundle: str, **_: Any) -> str:
        """A bundle that was exported again is loaded again."""
        state = (host.bundles()[bundle] / "manifest.json").stat()
        return f"{state.st_mtime_ns} {state.st_size} {state.st_ino}"

    def load(self, bundle: str, engine: str = "auto", memory: str = "auto", threads: int = 0) -> tuple[Pipeline, float]:
        pipeline = tmd_runtime.load(host.bundles()[bundle], engine, threads or None, memory=memory)
        return pipeline, float(pipeline.manifest.video.fps)


class TMDEncodePrompt:
    """A prompt to conditioning."""

    TITLE = "Encode prompt (tmd)"
    CATEGORY = "tmd"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    DESCRIPTION = "The embeddings of a prompt, by the text encoder of the bundle."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = {"multiline": True, "default": "a red circle moving right on a black background", "dynamicPrompts": True}
        return {"required": {"bundle": _BUNDLE_INPUT, "text": ("STRING", text)}}

    def encode(self, bundle: Pipeline, text: str) -> tuple[values.Conditioning]:
        return (values.conditioning_of(bundle.encode(text)),)


class TMDSampler:
    """Conditioning to latents: the few steps of the model."""

    TITLE = "Sampler (tmd)"
    CATEGORY = "tmd"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latents",)
    FUNCTION = "sample"
    DESCRIPTION = (
        "Makes the latents of a video or still. 0 leaves a setting to the model. Latents of a picture are what a run "
        "starts from, as far as strength says, or the first frame that it holds, whichever the model does."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        guidance = {"default": 0.0, "min": 0.0, "max": 1000.0, "step": 0.1, "tooltip": "1: none; 0: the model's own."}
        strength = {"default": 0.5, "min": 0.01, "max": 1.0, "step": 0.01, "tooltip": "How much of latents changes."}
        return {
            "required": {
                "bundle": _BUNDLE_INPUT,
                "positive": ("CONDITIONING", {"tooltip": "From Encode prompt."}),
                "seed": _whole(0, MAX_SEED, "The same seed makes the same video.", control_after_generate=True),
                "steps": _whole(0, MAX_STEPS, "Outer steps; 0: the model's own."),
                "inner_steps": _whole(0, MAX_STEPS, "Flow-head passes for each step; 0: the model's own."),
                "guidance": ("FLOAT", guidance),
                "width": _whole(0, 16384, "Pixels; 0: the model's own.", step=16),
                "height": _whole(0, 16384, "Pixels; 0: the model's own.", step=16),
                "frames": _whole(0, 4096, "1 plus a multiple of 4; 0: the model's own."),
                "preview": ("BOOLEAN", {"default": True, "tooltip": "Show what each step would end in. Takes time."}),
            },
            "optional": {
                "negative": ("CONDITIONING", {"tooltip": "What guidance steers away from."}),
                "latents": ("LATENT", {"tooltip": "Where the run starts, instead of noise alone."}),
                "strength": ("FLOAT", strength),
            },
        }

    def sample(
        self,
        bundle: Pipeline,
        positive: values.Conditioning,
        seed: int,
        steps: int = 0,
        inner_steps: int = 0,
        guidance: float = 0.0,
        width: int = 0,
        height: int = 0,
        frames: int = 0,
        preview: bool = True,
        negative: values.Conditioning | None = None,
        latents: values.Latent | None = None,
        strength: float = 0.5,
    ) -> tuple[values.Latent]:
        video = bundle.manifest.video
        start = None if latents is None else values.latents_of(latents, bundle.manifest)
        wishes: dict[str, Any] = {
            "steps": steps or None,
            "inner_steps": inner_steps or None,
            "frames": frames or None,
            "guidance": guidance or None,
        }
        if start is not None:
            stride = bundle.manifest.latents.spatial_stride
            wishes["size"] = (start.shape[4] * stride, start.shape[3] * stride)
            if family_of(bundle.manifest).takes_picture(bundle.manifest) != FIRST_FRAME:
                wishes["strength"] = strength
        elif width or height:
            wishes["size"] = (width or video.width, height or video.height)
        settings = bundle.settings(seed=seed, **wishes)
        bar, callback = host.watched("flow_head", settings.steps * settings.inner_steps)
        with host.stoppable():
            made = bundle.run(
                settings,
                last="denoise",
                callback=callback,
                prompt_embeds=values.embeds_of(positive, "positive"),
                negative_embeds=None if negative is None or settings.guidance == 1 else _negative(negative),
                init_latents=start,
                on_preview=bar.preview if preview and _can_preview(bundle, settings) else None,
            )
        assert made.latents is not None
        return (values.latent_of(made.latents, bundle.manifest),)


class TMDDecode:
    """Latents to images."""

    TITLE = "Decode (tmd)"
    CATEGORY = "tmd"
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("images", "fps")
    FUNCTION = "decode"
    DESCRIPTION = "The frames of latents, by the decoder of the bundle. Create Video and Save Video write them."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        latents = ("LATENT", {"tooltip": "From Sampler."})
        return {"required": {"bundle": _BUNDLE_INPUT, "latents": latents}}

    def decode(self, bundle: Pipeline, latents: values.Latent) -> tuple[Any, float]:
        import numpy as np

        found = values.latents_of(latents, bundle.manifest)
        _, callback = host.watched("decode", found.shape[2])
        with host.stoppable():
            frames = np.concatenate(list(bundle.decode_chunks(found, callback)))
        return values.image_of(frames), float(bundle.manifest.video.fps)


class TMDEncodeImage:
    """A picture to latents, for models that start from one."""

    TITLE = "Encode image (tmd)"
    CATEGORY = "tmd"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latents",)
    FUNCTION = "encode"
    DESCRIPTION = "The latents of the first picture, by the encoder of the bundle, for the Sampler's latents."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sides = {name: _whole(0, 16384, "Pixels; 0: the picture's own shape.", step=16) for name in ("width", "height")}
        return {"required": {"bundle": _BUNDLE_INPUT, "image": ("IMAGE",)}, "optional": sides}

    def encode(self, bundle: Pipeline, image: Any, width: int = 0, height: int = 0) -> tuple[values.Latent]:
        size = (width, height) if width and height else None
        _, callback = host.watched("encode", 1)
        with host.stoppable():
            latents = bundle.encode_image(values.picture_of(image), size, callback)
        return (values.latent_of(latents, bundle.manifest),)


NODES: tuple[Any, ...] = (TMDLoadBundle, TMDEncodePrompt, TMDSampler, TMDDecode, TMDEncodeImage)


def _negative(conditioning: values.Conditioning) -> Any:
    return values.embeds_of(conditioning, "negative")


def _can_preview(bundle: Pipeline, settings: Settings) -> bool:
    """A preview needs the decoder beside the model."""
    return "decoder_first" in bundle.manifest.graphs and bundle.choose_memory(settings) == "all"
