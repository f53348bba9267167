"""The recipe of the built-in model, one function per stage.

What only this model needs (text encoder, VAE) has its schedules here; data, teacher and distillation are the commands
that every model has, with `configs/tiny.yaml`. Every stage reads what the stages before it left in the run folder and
resumes its own checkpoint, so an interrupted run goes on with the same command.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch

from tmd_ref.checkpoint import load_model, save_model
from tmd_ref.distill import recipe
from tmd_ref.distill.config import load_config
from tmd_ref.distill.data import channel_statistics
from tmd_ref.distill.text import SceneReader, text_loss, train_tokenizer
from tmd_ref.distill.trainer import Schedule, fit
from tmd_ref.distill.vae import LONG_WINDOWS, SHORT_WINDOWS, decoder_loss, init_vae, vae_loss
from tmd_ref.partial import write_whole
from tmd_ref.student import load_student, save_student
from tmd_ref.text import Tokenizer
from tmd_ref.umt5 import UMT5_CONFIGS, UMT5Encoder
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE
from tmd_ref.wan import WAN_CONFIGS, WanTransformer

Report = Callable[[str], None]

VOCABULARY = 640
SCHEDULES = {
    "text": Schedule(steps=500, lr=2e-3, warmup=50, ema=0.99),
    "vae": Schedule(steps=4000, lr=2e-3, warmup=100, ema=0.995),
    "vae_long": Schedule(steps=5000, lr=1.5e-3, warmup=50, ema=0.997),
    "decoder": Schedule(steps=6000, lr=1.5e-3, warmup=100, ema=0.998),
}
SHIPPED = Path(__file__).parents[1] / "weights" / "tiny"


def text(run: Path, report: Report = print) -> None:
    """Tokenizer and text encoder -> `tokenizer.model`, `umt5.safetensors`."""
    run.mkdir(parents=True, exist_ok=True)
    train_tokenizer(run / "tokenizer.model", VOCABULARY, seed=1)
    tokenizer = _tokenizer(run)
    torch.manual_seed(0)
    config = dataclasses.replace(UMT5_CONFIGS["tiny"], vocab_size=tokenizer.vocab_size)
    reader = SceneReader(UMT5Encoder(config))
    fit(reader, text_loss(reader, tokenizer, seed=2), SCHEDULES["text"], run / "text", report=report)
    save_model(run / "umt5.safetensors", reader.encoder)


def vae(run: Path, report: Report = print) -> None:
    """VAE -> `vae.safetensors`, its latent statistics in the configuration."""
    torch.manual_seed(0)
    model = WanVAE(WAN_VAE_CONFIGS["tiny"])
    init_vae(model)
    model = fit(model, vae_loss(model, 1, SHORT_WINDOWS), SCHEDULES["vae"], run / "vae", report=report)
    model.requires_grad_(True)
    model = fit(model, vae_loss(model, 8, LONG_WINDOWS), SCHEDULES["vae_long"], run / "vae_long", report=report)
    mean, std = channel_statistics(model, seed=3)
    model.config = dataclasses.replace(model.config, latents_mean=tuple(mean), latents_std=tuple(std))
    save_model(run / "vae.safetensors", model)


def data(run: Path, report: Report = print) -> None:
    """Latents and prompt embeddings of the training scenes -> `data/`."""
    recipe.prepare(_job(run, report))


def decoder(run: Path, report: Report = print) -> None:
    """The VAE's decoder, further, in its fixed latent space -> `vae_decoder.safetensors`."""
    model = load_model(run / "vae.safetensors", WanVAE)
    model.decoder.requires_grad_(True)
    model.conv2.requires_grad_(True)
    loss = decoder_loss(model, 9, LONG_WINDOWS)
    save_model(run / "vae_decoder.safetensors", fit(model, loss, SCHEDULES["decoder"], run / "decoder", report=report))


def teacher(run: Path, report: Report = print) -> None:
    """Flow-matching teacher -> `teacher.safetensors`."""
    recipe.teacher(_job(run, report))


def stage1(run: Path, report: Report = print) -> None:
    """Student by TM-MeanFlow -> `student_stage1.safetensors`."""
    recipe.stage1(_job(run, report))


def stage2(run: Path, report: Report = print) -> None:
    """Student by DMD2-v with rollout -> `student.safetensors`."""
    recipe.stage2(_job(run, report))


def pack(run: Path, report: Report = print) -> None:
    """All weights in float16 -> the folder `weights`, which `tmd-export --checkpoint` takes.

    The student is that of stage 2, or that of stage 1 as long as there is no other.
    """
    out = run / "weights"
    student = run / "student.safetensors"
    if not student.exists():
        student = run / "student_stage1.safetensors"
    out.mkdir(exist_ok=True)
    write_whole(out / "tokenizer.model", (run / "tokenizer.model").read_bytes())
    save_model(out / "umt5.safetensors", load_model(run / "umt5.safetensors", UMT5Encoder).half())
    save_model(out / "vae.safetensors", load_model(run / "vae_decoder.safetensors", WanVAE).half())
    save_model(out / "teacher.safetensors", load_model(run / "teacher.safetensors", WanTransformer).half())
    save_student(out / "student.safetensors", load_student(student).half())
    made = {"schedules": {k: dataclasses.asdict(v) for k, v in SCHEDULES.items()}, **load_config("tiny").model_dump()}
    write_whole(out / "recipe.json", f"{json.dumps(made, indent=1)}\n".encode())
    size = sum(file.stat().st_size for file in out.iterdir())
    report(f"{out}: {size / 1e6:.1f} MB")


def evaluate(run: Path, report: Report = print) -> None:
    """Teacher and student on held-out captions, as packed -> `evaluation.json`, `evaluation.png`."""
    folder = run / "weights" if (run / "weights").exists() else SHIPPED
    recipe.evaluate(_job(folder, report), out=run)


def all(run: Path, report: Report = print) -> None:
    """Every stage in order, skipping those whose result is there."""
    for stage, result in (
        (text, "umt5.safetensors"),
        (vae, "vae.safetensors"),
        (data, "data/index.json"),
        (decoder, "vae_decoder.safetensors"),
        (teacher, "teacher.safetensors"),
        (stage1, "student_stage1.safetensors"),
        (stage2, "student.safetensors"),
        (pack, "weights/recipe.json"),
        (evaluate, "evaluation.json"),
    ):
        if (run / result).exists():
            report(f"{stage.__name__}: {run / result} is there, skipped")
        else:
            report(f"{stage.__name__}: {stage.__doc__}")
            stage(run, report)


def _job(run: Path, report: Report) -> recipe.Job:
    return recipe.Job(load_config("tiny"), run, report=report)


def _tokenizer(run: Path) -> Tokenizer:
    return Tokenizer(run / "tokenizer.model", WAN_CONFIGS["tiny"].text_len)
