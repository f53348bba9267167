"""The contenders that a user might run instead, with the weights of the same source. The only part that needs torch.

They do the denoising loop alone: no text encoder, no decoder.
"""

from __future__ import annotations

import math
from time import perf_counter, process_time
from typing import Any

import torch
from torch import nn

from tmd_export import open_source
from tmd_export.checkpoints.names import converted, uncut
from tmd_export.families import FAMILIES
from tmd_export.weights.precision import DTYPES, lower
from tmd_ref.samplers import effective_nfe

from .families import REFERENCE, default_preset
from .shortened import shortened
from .spec import Work


def source_of(work: Work) -> Any:
    """Where the weights come from. Raises tmd_export.ExportError."""
    if work.model is None:
        raise ValueError("a rival in torch needs the model's weights: give --model.")
    if work.blocks is not None:
        return shortened(work.model, work.random_seed or 0, work.kind, work.blocks)
    preset = None if work.random_seed is None else default_preset(work.kind, work.model)
    return open_source(work.model, list(work.checkpoint) or None, work.random_seed, preset=preset)


class TorchRun:
    """The reference itself (`tmd_ref`), eager or compiled with frozen weights, which is inductor's best mode."""

    def __init__(self, work: Work, compiled: bool) -> None:
        self._work, self._compiled = work, compiled

    def load(self) -> dict[str, float]:
        start, work = perf_counter(), self._work
        torch.set_num_threads(work.threads)
        source = source_of(work)
        module: Any = source.module("student")
        for name, _ in list(module.named_parameters()):
            module.load_state_dict({name: source.tensor("student", name).float()}, strict=False, assign=True)
        if work.precision != "fp32":
            lower(module, work.precision, FAMILIES[source.family].exact)
        if self._compiled:
            import torch._inductor.config as inductor

            inductor.freezing = True
            module.backbone.compile()
            module.head.compile()
        self._source, self._module = source, module
        self._noise, self._embeds = _inputs(source, work)
        return {"load": perf_counter() - start}

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        start, cpu, work, module = perf_counter(), process_time(), self._work, self._module
        REFERENCE[self._source.family](module, self._noise, self._embeds, work)
        return {"denoise": perf_counter() - start, "cpu": process_time() - cpu}


class DiffusersRun:
    """diffusers' `WanTransformer3DModel`, which has no flow head: full forward passes, scaled to the same NFE."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def load(self) -> dict[str, float]:
        start, work = perf_counter(), self._work
        from diffusers import WanTransformer3DModel

        torch.set_num_threads(work.threads)
        source = source_of(work)
        wan = source.wan
        with torch.device("meta"):
            model = WanTransformer3DModel(
                patch_size=wan.patch_size, num_attention_heads=wan.num_heads, attention_head_dim=wan.head_dim,
                in_channels=wan.in_channels, out_channels=wan.out_channels, text_dim=wan.text_dim,
                freq_dim=wan.freq_dim, ffn_dim=wan.ffn_dim, num_layers=wan.num_layers, cross_attn_norm=True,
                qk_norm="rms_norm_across_heads", eps=wan.eps, rope_max_seq_len=1024,
            ).eval()  # fmt: skip
        model.rope = type(model.rope)(wan.head_dim, wan.patch_size, 1024)  # tables, not weights
        dtype = DTYPES[work.precision]
        weights = {
            converted("transformer", uncut(name, wan.num_layers - source.head_blocks)): source.tensor("student", name)
            for name, _ in source.module("student").named_parameters()
            if not name.startswith(("head.interval_", "head.fusion."))
        }
        model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
        self._model: nn.Module = model
        noise, embeds = _inputs(source, work)
        self._noise, self._embeds = noise.to(dtype), embeds.to(dtype)
        self._nfe = effective_nfe(work.steps, work.inner_steps, source.head_blocks, wan.num_layers)
        return {"load": perf_counter() - start}

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        passes = math.ceil(self._nfe)
        start, cpu, x = perf_counter(), process_time(), self._noise
        for i in range(passes, 0, -1):
            t = torch.full((1,), 1000.0 * i / passes)
            x = x - self._model(x, t, self._embeds, return_dict=False)[0] / passes
        share = self._nfe / passes
        return {"denoise": (perf_counter() - start) * share, "cpu": (process_time() - cpu) * share}


def _inputs(source: Any, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise `[1,C,T,h,w]` of the asked size and embeddings `[1,S,E]`, none of them padding."""
    vae, wan = source.vae, source.wan
    frames, stride = 1 + (work.frames - 1) // vae.temporal_stride, vae.spatial_stride
    generator = torch.Generator().manual_seed(work.seed)
    noise = torch.randn(1, wan.in_channels, frames, work.height // stride, work.width // stride, generator=generator)
    return noise, torch.randn(1, wan.text_len, wan.text_dim, generator=generator)
