"""A bundle behind the call of diffusers' WanPipeline, without diffusers and without torch.

    from tmd_runtime.compat.diffusers import TmdPipeline

    pipe = TmdPipeline.from_bundle("my-bundle")
    video = pipe("a red circle", num_frames=17, num_inference_steps=2, generator=7).frames[0]   # float32 [F, H, W, 3]

What differs: sizes, frames, steps and guidance default to the bundle's; what the bundle cannot do is refused in a
sentence, and nothing is rounded; latents stay on the device, so a callback cannot change them. The same seed gives the
noise of `torch.Generator("cpu").manual_seed(seed)`, and so diffusers' video up to the precision of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageFailure
from ..pipeline import Pipeline, load

if TYPE_CHECKING:
    from typing import Self

    from ..clock import StepInfo
    from ..settings import Settings

OUTPUT_TYPES = ("np", "pil", "latent")
_LOADING = ("engine", "threads", "device", "memory", "plans")
_PRECISION = ("torch_dtype", "dtype", "variant")
StepEnd = Callable[["TmdPipeline", int, "float | None", dict[str, Any]], "dict[str, Any] | None"]


@dataclass
class TmdPipelineOutput:
    """`frames` of B videos: float32 `[B, F, H, W, 3]` in 0..1 ("np"), B lists of F pictures of Pillow ("pil"), or the
    latents, float32 `[B, C, T, h, w]` ("latent")."""

    frames: Any

    def __getitem__(self, key: int | str) -> Any:
        return self.frames if key == "frames" else (self.frames,)[key]  # type: ignore[index]  # as diffusers' outputs do


class TmdPipeline:
    """What code for diffusers' WanPipeline calls. `pipeline` is ours, and stays usable beside."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._interrupt = False
        self._options: dict[str, Any] = {}

    @classmethod
    def from_bundle(cls, bundle: str | Path | None = None, **options: Any) -> Self:
        """The pipeline of a bundle: a folder, "builtin:NAME", or None for the built-in model.

        `options` are engine, threads, device, memory and plans of `tmd_runtime.load`, and errors are those of it.
        """
        _refuse(set(options) - set(_LOADING), "from_bundle() and from_pretrained()", _LOADING)
        made = cls(load(bundle, **options))
        made._options = options
        return made

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Self:
        """The same, by the name that diffusers has for it. Nothing is downloaded: the name is a folder or builtin:NAME.

        Raises UsageFailure for a name on a hub, and for a precision, which is the bundle's.
        """
        precise = [option for option in _PRECISION if option in options]
        if precise:
            raise UsageFailure(
                f"a bundle has its precision already: leave {precise[0]} out; tmd-export --precision chooses it."
            )
        text = str(name)
        if not Path(text).exists() and text.count("/") == 1 and not text.startswith((".", "/", "~")):
            raise UsageFailure(
                f"{text} is no folder here, and the runtime downloads nothing: make a bundle of it with "
                f"tmd-export --checkpoint hf:{text} --out DIR, and name that folder."
            )
        return cls.from_bundle(name, **options)

    def to(self, device: Any) -> Self:
        """Run on "cpu", "cuda" or "cuda:N", or a device of torch. Loads nothing by itself; returns the pipeline."""
        return self._again(device=str(device))

    def enable_model_cpu_offload(self) -> None:
        """Load one stage after the other, as `memory="low"` does."""
        self._again(memory="low")

    def _again(self, **changed: Any) -> Self:
        options = {**self._options, **changed}
        before, self.pipeline = self.pipeline, load(self.pipeline.bundle, **options)
        self._options = options
        before.close()
        return self

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int | None = 1,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: str | None = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        image: Any = None,
        **unknown: Any,
    ) -> Any:
        """Make B videos, as a TmdPipelineOutput, or a tuple without `return_dict`: one for each prompt,
        times `num_videos_per_prompt`.

        `height` and `width` are in pixels. A `guidance_scale` of 1 or less switches guidance off, and the negative
        prompt with it. `generator` is a seed or a fresh torch.Generator, or a list of one for each video.
        `prompt_embeds` `[B, text, E]` may be arrays or tensors. `callback_on_step_end(pipe, step, timestep, {})` is
        called after every outer step, with a timestep in 0..1000, or None for a TMD student; `pipe._interrupt = True`
        there stops the run. `image` is a picture of Pillow or uint8 `[H, W, 3]`, for a model that starts from one.
        Raises UsageFailure for what the bundle cannot do, Cancelled, and what else a run of `Pipeline` raises.
        """
        _refuse(set(unknown), "the pipeline", _ARGUMENTS)
        self._check(output_type, guidance_scale_2, latents, attention_kwargs, max_sequence_length)
        tensors = set(callback_on_step_end_tensor_inputs) - {"latents"}
        if tensors:
            raise UsageFailure(f"a callback gets no tensors here, and {min(tensors)} is asked for: leave it out.")
        positive = None if prompt_embeds is None else _array(prompt_embeds, "prompt_embeds")
        negative = None if negative_prompt_embeds is None else _array(negative_prompt_embeds, "negative_prompt_embeds")
        texts = _texts(prompt, "prompt", None if positive is None else len(positive))
        steered = _steered(negative_prompt, len(texts))
        per_prompt = 1 if num_videos_per_prompt is None else num_videos_per_prompt
        if not isinstance(per_prompt, int) or per_prompt < 1:
            raise UsageFailure(f"{per_prompt!r} videos for each prompt cannot be made: give a whole number from 1.")
        count = len(texts) * per_prompt
        seeds = _seeds(generator, count)
        guidance = None if guidance_scale is None else 1.0 if guidance_scale <= 1 else guidance_scale
        wishes: dict[str, Any] = {"steps": num_inference_steps, "frames": num_frames, "size": self._size(width, height)}
        guided = (self.pipeline.settings(seed=0, **wishes).guidance if guidance is None else guidance) != 1
        videos = []
        for number in range(count):
            which = number // per_prompt
            # diffusers steers away from the empty prompt where none is given.
            away = (steered[which] or "") if guided and negative is None else None
            inputs: dict[str, Any] = {} if image is None else {"image": _picture(image)}
            if positive is not None:
                inputs["prompt_embeds"] = positive[which : which + 1]
            if negative is not None and guided:
                inputs["negative_embeds"] = negative[which : which + 1]
            settings = self.pipeline.settings(seed=seeds[number], guidance=guidance, negative_prompt=away, **wishes)
            videos.append(self._run(settings, texts[which], output_type, callback_on_step_end, inputs))
        frames = videos if output_type == "pil" else np.stack(videos)
        return TmdPipelineOutput(frames) if return_dict else (frames,)

    def _run(
        self, settings: Settings, prompt: str, output_type: str | None, callback: StepEnd | None, inputs: dict[str, Any]
    ) -> Any:
        """One video, as `output_type` says."""
        last: Any = "denoise" if output_type == "latent" else "decode"
        watch = None if callback is None else self._watch(settings, callback)
        result = self.pipeline.run(settings, prompt, last=last, callback=watch, **inputs)
        if output_type == "latent":
            assert result.latents is not None
            return result.latents[0]
        return _pictures(result.frames) if output_type == "pil" else result.frames.astype(np.float32) / 255

    def _watch(self, settings: Settings, callback: StepEnd) -> Callable[[StepInfo], bool]:
        """Turns what our runs report into the callback of diffusers."""
        self._interrupt = False

        def watch(info: StepInfo) -> bool:
            inner = info.total // settings.steps
            if info.stage == "flow_head" and inner and info.done % inner == 0:
                step = info.done // inner - 1
                time = 1000 * settings.times[step] if step < len(settings.times) else None
                if callback(self, step, time, _NoTensors()):
                    raise UsageFailure("a callback cannot change a run between its steps: return nothing, or {}.")
            return not self._interrupt

        return watch

    def _size(self, width: int | None, height: int | None) -> tuple[int, int] | None:
        if width is None and height is None:
            return None
        video = self.pipeline.manifest.video
        return video.width if width is None else width, video.height if height is None else height

    def _check(
        self, output_type: str | None, guidance_2: Any, latents: Any, attention: Any, max_sequence_length: int | None
    ) -> None:
        length = self.pipeline.manifest.text.max_length
        if output_type == "pt":
            raise UsageFailure(
                "there is no torch in this runtime: take output_type='np', and in your program "
                "torch.from_numpy(frames).permute(0, 1, 4, 2, 3)."
            )
        if output_type not in OUTPUT_TYPES:
            raise UsageFailure(f"there is no output_type {output_type!r}: choose one of {', '.join(OUTPUT_TYPES)}.")
        for name, value, remedy in (
            ("guidance_scale_2", guidance_2, "one guidance is for both transformers: leave it out"),
            ("latents", latents, "the noise comes from a seed: give a generator"),
            ("attention_kwargs", attention, "attention is in the graphs: leave it out"),
        ):
            if value is not None:
                raise UsageFailure(f"{name} cannot be chosen here, {remedy}.")
        if max_sequence_length not in (None, length):
            raise UsageFailure(f"this bundle reads prompts of {length} tokens: leave max_sequence_length out.")


class _NoTensors(dict[str, Any]):
    """What a callback gets in the place of tensors."""

    def __missing__(self, name: str) -> Any:
        raise UsageFailure(f"{name} stays on the device during a run: a callback cannot read or change it.")


_ARGUMENTS = tuple(TmdPipeline.__call__.__code__.co_varnames[1 : TmdPipeline.__call__.__code__.co_argcount])


def _refuse(unknown: set[str], where: str, known: Sequence[str]) -> None:
    if unknown:
        raise UsageFailure(f"{where} has no argument {min(unknown)!r}: it takes {', '.join(known)}.")


def _texts(prompt: str | Sequence[str] | None, name: str, embedded: int | None) -> list[str]:
    """One prompt for each video; empty ones where embeddings take their place."""
    if prompt is not None and embedded is not None:
        raise UsageFailure(f"{name} and {name}_embeds are two prompts: give one of them.")
    if embedded is not None:
        return [""] * embedded
    if prompt is None:
        raise UsageFailure("there is no prompt: give prompt or prompt_embeds.")
    texts = _listed(prompt, name)
    if not texts:
        raise UsageFailure("the list of prompts is empty: give at least one.")
    return texts


def _listed(texts: str | Sequence[str], name: str) -> list[str]:
    found: list[Any] = list(texts) if isinstance(texts, list | tuple) else [texts]
    for text in found:
        if not isinstance(text, str):
            raise UsageFailure(f"{name} must be a text or a list of texts, not a {type(text).__name__}.")
    return found


def _steered(prompt: str | Sequence[str] | None, count: int) -> list[str | None]:
    """A negative prompt for each of `count` prompts."""
    if prompt is None:
        return [None] * count
    texts = _listed(prompt, "negative_prompt")
    if isinstance(prompt, str):
        texts *= count
    if len(texts) != count:
        raise UsageFailure(f"there are {count} prompts and {len(texts)} negative prompts: give one text, or {count}.")
    return list(texts)


def _seeds(generator: Any, count: int) -> list[int | None]:
    """A seed for each video, None where chance decides."""
    if generator is None:
        return [None] * count
    given = list(generator) if isinstance(generator, list | tuple) else [generator]
    if len(given) != count:
        raise UsageFailure(
            f"there are {count} videos and {len(given)} generator{'s' * (len(given) != 1)}: give a list of {count}."
        )
    return [_seed(one) for one in given]


def _seed(generator: Any) -> int:
    """A seed as it is, or the one that a generator of torch started from, of which nothing may have been drawn yet."""
    if hasattr(generator, "initial_seed"):
        fresh = type(generator)(generator.device).manual_seed(generator.initial_seed())
        if generator.device.type != "cpu" or bool((fresh.get_state() != generator.get_state()).any()):
            raise UsageFailure(
                "noise is that of a fresh generator on the CPU, and this one is on another device or has drawn before: "
                "give torch.Generator().manual_seed(SEED), or the seed."
            )
        return int(generator.initial_seed())
    if isinstance(generator, bool) or not hasattr(generator, "__index__"):
        raise UsageFailure(f"a generator is a seed or a torch.Generator, not a {type(generator).__name__}.")
    return int(generator)


def _array(values: Any, name: str) -> NDArray[Any]:
    """Float32 `[B, text, E]` of an array or of a tensor of torch, wherever that lies."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().float().numpy()
    found = np.asarray(values)
    if found.ndim != 3 or found.dtype.kind not in "fiu" or not len(found):
        raise UsageFailure(f"{name} must be numbers [videos, text, width], not {found.dtype} {list(found.shape)}.")
    return found.astype(np.float32)


def _picture(image: Any) -> NDArray[np.uint8]:
    """uint8 `[H, W, 3]` of a picture of Pillow, or of an array, which the run checks."""
    return np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)


def _pictures(frames: NDArray[np.uint8]) -> list[Any]:
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageFailure(
            "output_type='pil' needs Pillow, which is not installed: pip install pillow, or take 'np'."
        ) from error
    return [Image.fromarray(frame) for frame in frames]
