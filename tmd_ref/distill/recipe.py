"""The commands of `tmd-distill` that take a config: prepare, teacher, stage1, stage2, evaluate.

A run is a folder. Every command reads what the ones before it left there, or in the `inputs` folder (so that several
variants share data and teacher), and resumes its own checkpoint: an interrupted run goes on with the same command.

| file | made by |
|---|---|
| data/ | prepare |
| teacher.safetensors | teacher, or given |
| student_stage1.safetensors | stage1 |
| student.safetensors | stage2 |
| evaluation.json, evaluation.png | evaluate |

A baseline without flow head writes generator_stage1.safetensors and generator.safetensors instead.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tmd_ref.checkpoint import save_model
from tmd_ref.distill.config import Config, ConfigError
from tmd_ref.distill.data import CLIP_FRAMES, LatentDataset, claim, encode_prompts, render_shard, write_index
from tmd_ref.distill.discriminator import Discriminator
from tmd_ref.distill.draws import Draws
from tmd_ref.distill.parallel import World, autocast, bare, place
from tmd_ref.distill.state import fingerprint, gather
from tmd_ref.distill.trainer import Objective, Run, Scalars, train
from tmd_ref.distill.weights import load_teacher, load_text_encoder, load_vae
from tmd_ref.student import TMDStudent, load_student, save_student
from tmd_ref.text import Tokenizer
from tmd_ref.wan import WanTransformer


@dataclass(frozen=True)
class Job:
    """One command's surroundings."""

    config: Config
    run: Path
    inputs: Path | None = None
    world: World = World()  # noqa: RUF009 (immutable)
    report: Callable[[str], None] = print
    read: dict[str, Path] = field(default_factory=dict)  # what this command has found so far

    def find(self, name: str) -> Path:
        """A given file, or a result of another command: as it is written, in the run folder, or in the inputs."""
        places = [Path(name), self.run / name, *([self.inputs / name] if self.inputs else [])]
        for path in places[1:] if len(Path(name).parts) == 1 else places:
            if path.exists():
                self.read[name] = path
                return path
        where = " or ".join(str(path.parent) for path in places[1:])
        raise FileNotFoundError(
            f"there is no {name} in {where}: run the command that makes it, name the run folder that "
            "has it (--inputs DIR), or the file itself (--set sources.NAME=FILE, where NAME is teacher, student, "
            "tokenizer, text_encoder or vae)."
        )

    def data(self) -> LatentDataset:
        name = "data" if (self.run / "data").exists() or not self._single_shard() else "data.safetensors"
        return LatentDataset(self.find(name), self.config.data.latent_size)

    def _single_shard(self) -> bool:
        return any((folder / "data.safetensors").is_file() for folder in (self.run, self.inputs or self.run))

    def load_teacher(self) -> WanTransformer:
        return load_teacher(self.find(self.config.sources.teacher), self.config.wan)

    def load_start(self) -> WanTransformer:
        """The transformer that the student is made of: the teacher, or a few-step student of another method."""
        sources = self.config.sources
        return load_teacher(self.find(sources.student or sources.teacher), self.config.wan)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.find(self.config.sources.tokenizer), self.config.wan.text_len)

    def place(self, network: nn.Module, frozen: bool = False, half: bool = True) -> Any:
        """Bring a network to the device. A frozen one keeps its blocks in bfloat16 if the run computes in it."""
        machine = self.config.machine
        if frozen:
            network.requires_grad_(False)
            if machine.bf16:
                network.get_submodule("blocks").bfloat16()
        return place(network, self.world, machine.recompute, machine.bf16 and half, machine.shard)

    def training(self, name: str, stage: Any) -> Run:
        """How a stage is run; what it was asked to do goes into its checkpoint."""
        config = self.config
        settings = {"stage": stage.model_dump(mode="json"), "model": config.model,
                    "data": config.data.model_dump(mode="json")}  # fmt: skip
        if isinstance(config, Config):
            settings["student"] = config.student.model_dump(mode="json")
        settings |= self.inputs_read()
        machine = config.machine
        return Run(self.run / name, stage.batch, getattr(stage, "micro", None), stage.seed, settings,
                   machine.log_every, machine.save_every, self.world, self.report)  # fmt: skip

    def inputs_read(self) -> dict[str, str]:
        """What tells the files that this command has read from others of the same names."""
        return {f"input {found}": fingerprint(path) for found, path in sorted(self.read.items())}

    def cast(self, objective: Objective) -> Objective:
        """The objective under autocast, if the run computes in bfloat16."""

        def casting(draws: Draws) -> tuple[Tensor, Scalars]:
            with autocast(self.world, self.config.machine.bf16):
                return objective(draws)

        return casting if self.config.machine.bf16 else objective

    def save(self, name: str, network: nn.Module) -> None:
        """Write a trained network, gathered from all processes, as safetensors."""
        weights = gather(bare(network).state_dict(), keep=self.world.first)
        if self.world.first:
            original = bare(network)
            with torch.device("meta"):
                whole: Any = (
                    TMDStudent(original.config, original.head_blocks, original.fusion, grids=original.grids)
                    if isinstance(original, TMDStudent)
                    else WanTransformer(original.config)
                )
            whole.load_state_dict(weights, assign=True)
            path = self.run / name
            if isinstance(whole, TMDStudent):
                _tie(whole)
                save_student(path, whole)
            else:
                save_model(path, whole)
            self.report(f"wrote {path}")
        self.world.wait()


def prepare(job: Job, videos: Path | None = None) -> None:
    """Latents and prompt embeddings of videos and captions, or of rendered scenes -> `data/`."""
    from tmd_ref.distill.prepare import encode_videos, read_list

    config, out = job.config, job.run / "data"
    rendered = config.data.clips if videos is None else None
    if videos is None and rendered is None:
        raise ConfigError("data.clips is not set, so scenes are not rendered: give the list of videos with --videos.")
    entries = read_list(videos) if videos else []
    vae = load_vae(job.find(config.sources.vae)).to(job.world.device)
    encoder = load_text_encoder(job.find(config.sources.text_encoder)).to(job.world.device)
    tokenizer = job.tokenizer()
    listed = {} if videos is None else {"list of videos": fingerprint(videos)}
    claim(out, {**config.data.model_dump(mode="json"), **job.inputs_read(), **listed}, job.world.first)
    if rendered is None:
        clips = encode_videos(
            entries, out, config.data, vae, encoder, tokenizer, job.world, config.machine.bf16, job.report
        )
    else:
        if tuple(config.data.size) != (64, 64) or config.data.frames not in (1, CLIP_FRAMES):
            raise ConfigError("data.size, data.frames: rendered training scenes are 64x64 pixels and 17 frames, or 1.")
        for number, first in enumerate(range(0, rendered, config.data.shard)):
            path = out / f"{number:06d}.safetensors"
            if number % job.world.size == job.world.rank and not path.exists():
                count = min(config.data.shard, rendered - first)
                render_shard(
                    path, vae, encoder, tokenizer, count, config.data.seed, first, job.report, config.data.frames,
                    config.data.negative_prompt,
                )  # fmt: skip
        job.world.wait()
        clips = write_index(out, config.data.model_dump(mode="json")) if job.world.first else 0
        job.world.wait()
    if job.world.first:
        job.report(f"{out}: {clips} clips")


def teacher(job: Job) -> None:
    """A flow-matching teacher, from scratch or from `sources.pretrained` -> `teacher.safetensors`."""
    from tmd_ref.distill.teacher import teacher_loss

    settings = job.config.teacher
    if settings is None:
        raise ConfigError(f"the config has no `teacher`: that of {job.config.model} is given, not trained.")
    data = job.data()
    torch.manual_seed(0)
    given = job.config.sources.pretrained
    network = load_teacher(job.find(given), job.config.wan) if given else WanTransformer(job.config.wan)
    network.requires_grad_(True)
    if job.config.machine.compile and (job.world.size == 1 or not job.config.machine.shard):
        network.compile()
    model = job.place(network)
    loss = job.cast(teacher_loss(model, data, settings.shift, settings.dropout, settings.adaptive))
    schedule = settings.optimizer.schedule(settings.steps)
    trained = train({"teacher": (model, schedule)}, loss, job.training("teacher", settings))
    job.save("teacher.safetensors", trained["teacher"])


def stage1(job: Job) -> None:
    """The generator's pre-training -> `student_stage1.safetensors` (baseline: `generator_stage1.safetensors`)."""
    from tmd_ref.distill.stage1 import tm_meanflow_loss

    settings, student = job.config.stage1, job.config.student
    data = job.data()
    if not student.is_tmd and settings.objective != "kd":
        raise ConfigError("the baseline (student.head_blocks 0) has no stage 1, except stage1.objective kd at M = 1.")
    if not student.is_tmd:
        return _knowledge_distillation(job, data)
    torch.manual_seed(0)
    wan = job.load_start().requires_grad_(True)
    # the differences of stage 1 are taken in float32, so blocks are gathered in float32
    network = job.place(TMDStudent.from_teacher(wan, student.head_blocks, student.fusion, student.grids), half=False)
    del wan
    if settings.derivative == "exact" and job.world.size > 1:
        raise ConfigError("stage1.derivative exact: forward mode does not work on sharded weights; use difference.")
    objective = tm_meanflow_loss(
        network, data, student.outer_steps, student.inner_steps, settings.guidance, settings.dropout,
        1.0 if settings.objective == "tm" else settings.instant_share,
        None if settings.derivative == "exact" else settings.delta, settings.weight_constant,
        settings.average, (student.outer_shift, student.inner_shift, settings.shift),
    )  # fmt: skip
    schedule = settings.optimizer.schedule(settings.steps)
    trained = train({"student": (network, schedule)}, job.cast(objective), job.training("stage1", settings))
    job.save("student_stage1.safetensors", trained["student"])
    return None


def _knowledge_distillation(job: Job, data: LatentDataset) -> None:
    from tmd_ref.distill.kd import kd_loss, write_pairs

    config, settings = job.config, job.config.stage1
    pairs = settings.pairs
    assert pairs is not None  # the config says so
    fixed = job.place(job.load_teacher(), frozen=True)
    claim(job.run / "pairs", {**pairs.model_dump(mode="json"), **job.inputs_read()}, job.world.first)
    write_pairs(
        job.run / "pairs", fixed, data, pairs.count, pairs.seed, steps=pairs.sampler_steps, shift=pairs.shift,
        guidance=pairs.guidance, skip=pairs.skip_layers, world=job.world, report=job.report,
    )  # fmt: skip
    del fixed
    gc.collect()
    network = job.place(job.load_start().requires_grad_(True))
    loss = kd_loss(network, LatentDataset(job.run / "pairs"), pairs.seed, config.student.outer_shift)
    schedule = settings.optimizer.schedule(settings.steps)
    trained = train({"generator": (network, schedule)}, job.cast(loss), job.training("stage1", settings))
    job.save("generator_stage1.safetensors", trained["generator"])


def stage2(job: Job) -> None:
    """DMD2-v -> `student.safetensors` (baseline: `generator.safetensors`)."""
    from tmd_ref.distill.stage2 import Stage2

    config, settings, student = job.config, job.config.stage2, job.config.student
    data = job.data()
    generator: nn.Module
    if student.is_tmd:
        generator = load_student(job.find("student_stage1.safetensors")).float()
        if (generator.head_blocks, generator.fusion) != (student.head_blocks, student.fusion):
            raise ConfigError(
                f"student_stage1.safetensors has {generator.head_blocks} head blocks and {generator.fusion} fusion, "
                f"the config asks for {student.head_blocks} and {student.fusion}: run stage1 with this config."
            )
        generator.grids = student.grids
    elif config.stage1.objective == "kd":
        generator = load_teacher(job.find("generator_stage1.safetensors"), config.wan)
    else:
        generator = job.load_start()
    torch.manual_seed(0)
    networks = {
        "generator": job.place(generator.requires_grad_(True)),
        "fake": job.place(job.load_teacher().requires_grad_(True)),
    }
    if settings.gan_weight:
        networks["discriminator"] = job.place(Discriminator(config.wan, len(settings.depths), settings.reduction))
    objective = Stage2(
        networks["generator"], job.place(job.load_teacher(), frozen=True), networks["fake"],
        networks.get("discriminator"), data, student.outer_steps,
        student.inner_steps if settings.rollout else 1, settings.guidance,
        settings.gan_weight, settings.depths, settings.ratio, settings.normaliser,
        (student.outer_shift, student.inner_shift, settings.shift),
    )  # fmt: skip
    schedules = {name: getattr(settings, name).schedule(settings.steps) for name in networks}
    trained = train(
        {name: (network, schedules[name]) for name, network in networks.items()},
        job.cast(objective), job.training("stage2", settings), objective.turn,
    )  # fmt: skip
    job.save("student.safetensors" if student.is_tmd else "generator.safetensors", trained["generator"])


def evaluate(job: Job, out: Path | None = None, videos: Path | None = None, clips: int = 1) -> None:
    """Teacher and what was distilled from it -> `evaluation.json`, `.png`: on held-out captions of rendered scenes, or
    on the captions of `videos`, a list as for `prepare`, `clips` of each (and `videos/`).

    `out`: where the results go; None: the run folder.
    """
    from tmd_ref.distill import evaluate as table
    from tmd_ref.distill.evaluate_videos import measure_videos
    from tmd_ref.distill.prepare import read_list

    config, settings, student = job.config, job.config.evaluate, job.config.student
    if clips != 1 and videos is None:
        raise ConfigError("clips are counted for real videos alone: list them (--videos), or leave out --clips.")
    if config.model != "tiny" and videos is None:
        raise ConfigError("without rendered scenes there is nothing to compare with: list held-out videos (--videos).")
    device = job.world.device
    encoder, tokenizer = load_text_encoder(job.find(config.sources.text_encoder)).to(device), job.tokenizer()
    vae = load_vae(job.find(config.sources.vae)).to(device)
    negative = encode_prompts(encoder, tokenizer, [config.data.negative_prompt])
    shape = (config.wan.in_channels, *config.data.latent_size)
    steps = settings.teacher_steps
    rows = [table.teacher_row(f"teacher {steps}x2", job.load_teacher().to(device), negative, steps, settings.shift,
                              settings.guidance, shape)]  # fmt: skip
    m, n = student.outer_steps, student.inner_steps
    for name, kind in (("student_stage1", "TMD stage 1"), ("student", "TMD")):
        if student.is_tmd and (path := _found(job, f"{name}.safetensors")):
            tmd = load_student(path).float().eval().to(device)
            rows.append(table.student_row(f"{kind} M={m} N={n}", tmd, m, n, shape))
    for name, kind in (("generator_stage1", "DMD2-v warm-up"), ("generator", "DMD2-v")):
        if not student.is_tmd and (path := _found(job, f"{name}.safetensors")):
            wan = load_teacher(path, config.wan).to(device)
            rows.append(table.baseline_row(f"{kind} M={m}", wan, m, student.outer_shift, shape))
    if videos is not None:
        measure_videos(rows, vae, encoder, tokenizer, read_list(videos), config.data, out or job.run, clips=clips,
                       seed=settings.seed, report=job.report, device=device)  # fmt: skip
        return
    table.measure(
        rows, vae, encoder, tokenizer, out or job.run, count=settings.captions, seed=settings.seed,
        frames=config.data.frames, size=config.data.size, report=job.report,
    )  # fmt: skip


def _found(job: Job, name: str) -> Path | None:
    try:
        return job.find(name)
    except FileNotFoundError:
        return None


def _tie(student: TMDStudent) -> None:
    """Let the flow head hold the backbone's own weights again where the two are one; loading made them separate."""
    for name in ("patch_embedding", "time_embedding", "time_projection"):
        setattr(student.head, name, getattr(student.backbone, name))
