"""The contenders in torch that a user might run instead, with the weights of the same source.

The loop is the reference's (`tmd_ref`) or diffusers'; text encoder and autoencoder are those of transformers and of
diffusers, as they come.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import torch
from torch import nn

from tmd_export import open_source
from tmd_export.checkpoints.names import converted, uncut
from tmd_export.families import FAMILIES
from tmd_export.weights.precision import DTYPES, lower
from tmd_ref.samplers import effective_nfe

from .families import REFERENCE
from .random_model import random_model
from .spec import Work

WORDS = 23
"""Tokens of the prompt that are read, of all to which it is padded."""


def source_of(work: Work) -> Any:
    """Where the weights come from. Raises tmd_export.ExportError."""
    if work.model is None:
        raise ValueError("a rival in torch needs the model's weights: give --model.")
    if work.random_seed is not None:
        return random_model(work.model, work.random_seed, work.kind, work.blocks)
    return open_source(work.model, list(work.checkpoint) or None)


class _Rival(ABC):
    """Loads and runs the stages of a work; `precision` is that of the weights and of the products."""

    def __init__(self, work: Work) -> None:
        self._work = work
        # Beside a bundle in 8 bits or fewer, torch computes in bfloat16: it has no such layers.
        self._precision = work.precision if work.precision in ("fp32", "fp16") else "bf16"
        self._dtype = DTYPES[self._precision]

    @torch.no_grad()
    def load(self) -> dict[str, float]:
        start = perf_counter()
        torch.set_num_threads(self._work.threads)
        source = source_of(self._work)
        makers = {"text": self.text, "denoise": self.denoise, "decode": self.decode}
        self._runs = {stage: makers[stage](source) for stage in self._work.stages}
        return {"load": perf_counter() - start}

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        cpu: dict[str, float] = {}
        for stage, (run, share) in self._runs.items():
            start, began = perf_counter(), process_time()
            run()
            seconds[stage], cpu[stage] = share * (perf_counter() - start), share * (process_time() - began)
        return {**seconds, "cpu": cpu[self._work.main_stage]}

    def compiled(self, module: Any) -> Any:
        """`module` as it is run."""
        return module

    @abstractmethod
    def denoise(self, source: Any) -> tuple[Callable[[], Any], float]:
        """The loop, and the share of its time that is told."""

    def text(self, source: Any) -> tuple[Callable[[], Any], float]:
        """transformers' `UMT5EncoderModel` on one padded prompt."""
        from transformers import UMT5Config, UMT5EncoderModel

        sizes = source.module("text_encoder").config
        config = UMT5Config(
            vocab_size=sizes.vocab_size, d_model=sizes.dim, d_kv=sizes.head_dim, d_ff=sizes.ffn_dim,
            num_layers=sizes.num_layers, num_heads=sizes.num_heads, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )  # fmt: skip
        with torch.device("meta"):
            model = UMT5EncoderModel(config).eval()
        state = {converted("text_encoder", name): source.tensor("text_encoder", name).to(self._dtype)
                 for name in source.module("text_encoder").state_dict()}  # fmt: skip
        model.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]}, assign=True)
        length = source.wan.text_len
        ids, mask = torch.zeros(2, 1, length, dtype=torch.int64)
        ids[:, :WORDS] = torch.arange(2, 2 + WORDS)
        mask[:, :WORDS] = 1
        encode = self.compiled(model)
        return lambda: encode(input_ids=ids, attention_mask=mask).last_hidden_state, 1.0

    def decode(self, source: Any) -> tuple[Callable[[], Any], float]:
        """diffusers' `AutoencoderKLWan`, from latents to uint8 frames."""
        from diffusers import AutoencoderKLWan

        vae = source.vae
        if vae.shortcuts:
            raise ValueError("only the autoencoder of Wan2.1 is compared: leave the decoder out (--parts).")
        with torch.device("meta"):
            model = AutoencoderKLWan(base_dim=vae.dim, z_dim=vae.z_dim, dim_mult=list(vae.dim_mult)).eval()
        state = {converted("vae", name): source.tensor("vae", name).to(self._dtype)
                 for name in source.module("vae").state_dict()}  # fmt: skip
        model.load_state_dict(state, assign=True)
        model.decoder = self.compiled(model.decoder)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
        noise = (noise_of(source, self._work) * std + mean).to(self._dtype)

        def run() -> torch.Tensor:
            frames = model.decode(noise, return_dict=False)[0]
            return ((frames.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

        return run, 1.0


class TorchRun(_Rival):
    """The reference itself (`tmd_ref`), eager or compiled with frozen weights, which is inductor's best mode."""

    def __init__(self, work: Work, compiled: bool) -> None:
        super().__init__(work)
        self._compiled = compiled
        if compiled:
            import torch._inductor.config as inductor

            inductor.freezing = True

    def compiled(self, module: Any) -> Any:
        if self._compiled:
            module.compile()
        return module

    def denoise(self, source: Any) -> tuple[Callable[[], Any], float]:
        work, module = self._work, source.module("student")
        if self._precision != "fp32":
            lower(module, self._precision, FAMILIES[source.family].exact)
        types = {name: parameter.dtype for name, parameter in module.named_parameters()}
        for name, dtype in types.items():  # one at a time: the whole in float32 would be the peak of its memory
            module.load_state_dict({name: source.tensor("student", name).to(dtype)}, strict=False, assign=True)
        self.compiled(module.backbone)
        self.compiled(module.head)
        noise, embeds = noise_of(source, work), embeds_of(source, work)
        self.module, self.noise, self.embeds = module, noise, embeds
        return lambda: REFERENCE[source.family](module, noise, embeds, work), 1.0


class DiffusersRun(_Rival):
    """diffusers' `WanTransformer3DModel`, which has no flow head: full forward passes, scaled to the same NFE."""

    def denoise(self, source: Any) -> tuple[Callable[[], Any], float]:
        from diffusers import WanTransformer3DModel

        work, wan = self._work, source.wan
        with torch.device("meta"):
            model: nn.Module = WanTransformer3DModel(
                patch_size=wan.patch_size, num_attention_heads=wan.num_heads, attention_head_dim=wan.head_dim,
                in_channels=wan.in_channels, out_channels=wan.out_channels, text_dim=wan.text_dim,
                freq_dim=wan.freq_dim, ffn_dim=wan.ffn_dim, num_layers=wan.num_layers, cross_attn_norm=True,
                qk_norm="rms_norm_across_heads", eps=wan.eps, rope_max_seq_len=1024,
            ).eval()  # fmt: skip
        model.rope = type(model.rope)(wan.head_dim, wan.patch_size, 1024)  # tables, not weights
        weights = {
            converted("transformer", uncut(name, wan.num_layers - source.head_blocks)): source.tensor("student", name)
            .to(self._dtype)
            for name, _ in source.module("student").named_parameters()
            if not name.startswith(("head.interval_", "head.fusion."))
        }  # fmt: skip
        model.load_state_dict(weights, assign=True)
        noise, embeds = noise_of(source, work).to(self._dtype), embeds_of(source, work).to(self._dtype)
        self.model, self.noise, self.embeds = model, noise, embeds
        nfe = evaluations(work, source)
        passes = math.ceil(nfe)

        def run() -> torch.Tensor:
            x = noise
            for i in range(passes, 0, -1):
                t = torch.full((1,), 1000.0 * i / passes)
                x = x - model(x, t, embeds, return_dict=False)[0] / passes
            return x

        return run, nfe / passes


def evaluations(work: Work, source: Any) -> float:
    """Full passes of the transformer that cost as much as the loop of `work`."""
    if source.fusion is None:  # no inner flow
        return float(work.steps)
    return effective_nfe(work.steps, work.inner_steps, source.head_blocks, source.wan.num_layers)


def noise_of(source: Any, work: Work) -> torch.Tensor:
    """Noise `[1,C,T,h,w]` of the asked size."""
    vae, wan = source.vae, source.wan
    frames, stride = 1 + (work.frames - 1) // vae.temporal_stride, vae.spatial_stride
    shape = (1, wan.in_channels, frames, work.height // stride, work.width // stride)
    return torch.randn(shape, generator=torch.Generator().manual_seed(work.seed))


def embeds_of(source: Any, work: Work) -> torch.Tensor:
    """Embeddings `[1,S,E]`, none of them padding."""
    wan = source.wan
    return torch.randn(1, wan.text_len, wan.text_dim, generator=torch.Generator().manual_seed(work.seed + 1))
