"""The commands of `tmd-distill` for a Transition Model: prepare, tim, evaluate, pack. Runs are as in `recipe`.

| file | made by |
|---|---|
| data/ | prepare |
| tim.safetensors | tim |
| evaluation.json, evaluation.png | evaluate |
| weights/ | pack |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tmd_ref.checkpoint import load_model, save_model
from tmd_ref.distill import recipe
from tmd_ref.distill.config import ConfigError
from tmd_ref.distill.data import encode_prompts
from tmd_ref.distill.parallel import bare
from tmd_ref.distill.state import gather
from tmd_ref.distill.tim import tim_loss
from tmd_ref.distill.tim_config import TiMRun
from tmd_ref.distill.trainer import AveragedWeights, train
from tmd_ref.distill.weights import load_text_encoder, load_vae
from tmd_ref.partial import write_whole
from tmd_ref.text import Tokenizer
from tmd_ref.tim.model import TiM

WEIGHTS = "tim.safetensors"


@dataclass(frozen=True)
class TiMJob(recipe.Job):
    """One command's surroundings."""

    config: TiMRun  # type: ignore[assignment]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.find(self.config.sources.tokenizer), self.config.network.text_len)

    def save(self, name: str, network: nn.Module) -> None:
        weights = gather(bare(network).state_dict(), keep=self.world.first)
        if self.world.first:
            with torch.device("meta"):
                whole = TiM(bare(network).config)
            whole.load_state_dict(weights, assign=True)
            save_model(self.run / name, whole)
            self.report(f"wrote {self.run / name}")
        self.world.wait()


prepare = recipe.prepare
"""Latents of stills and their prompt embeddings -> `data/`."""


def tim(job: TiMJob) -> None:
    """The network, from scratch or from `sources.pretrained` -> `tim.safetensors`."""
    config, settings = job.config, job.config.tim
    data = job.data()
    if settings.derivative == "exact" and job.world.size > 1:
        raise recipe.ConfigError("tim.derivative exact: forward mode does not work on sharded weights; use difference.")
    torch.manual_seed(0)
    # the differences are taken in float32, so blocks are gathered in float32
    given = config.sources.pretrained
    network = load_model(job.find(given), TiM).float() if given else TiM(config.network)
    network = job.place(network.requires_grad_(True), half=False)
    averaged = AveragedWeights() if settings.guided is not None else None
    objective = job.cast(tim_loss(network, data, settings, averaged))
    schedule = settings.optimizer.schedule(settings.steps)
    trained = train({"tim": (network, schedule)}, objective, job.training("tim", settings), averaged=averaged)
    job.save(WEIGHTS, trained["tim"])


def pack(job: TiMJob) -> None:
    """All weights in float16 -> the folder `weights`, which `tmd-export --checkpoint` takes."""
    out, sources = job.run / "weights", job.config.sources
    out.mkdir(exist_ok=True)
    write_whole(out / "tokenizer.model", job.find(sources.tokenizer).read_bytes())
    save_model(out / "umt5.safetensors", load_text_encoder(job.find(sources.text_encoder)).half())
    save_model(out / "vae.safetensors", load_vae(job.find(sources.vae)).half())
    save_model(out / WEIGHTS, load_model(job.find(WEIGHTS), TiM).half())
    recipe = json.dumps(job.config.model_dump(mode="json"), indent=1)
    write_whole(out / "recipe.json", f"{recipe}\n".encode())
    size = sum(file.stat().st_size for file in out.iterdir())
    job.report(f"{out}: {size / 1e6:.1f} MB")


def evaluate(job: TiMJob, videos: Path | None = None, clips: int = 1) -> None:
    """The model on held-out captions of rendered stills, at each number of steps -> `evaluation.json`, `.png`."""
    if videos is not None:
        raise ConfigError("a Transition Model makes stills: --videos is for models of videos.")
    from tmd_ref.distill import tim_evaluate

    config, device = job.config, job.world.device
    encoder, tokenizer = load_text_encoder(job.find(config.sources.text_encoder)).to(device), job.tokenizer()
    model, vae = load_model(job.find(WEIGHTS), TiM).to(device), load_vae(job.find(config.sources.vae)).to(device)
    tim_evaluate.measure(
        model, vae, encoder, tokenizer,
        encode_prompts(encoder, tokenizer, [config.data.negative_prompt]), job.run, config.evaluate,
        size=config.data.size, report=job.report,
    )  # fmt: skip
