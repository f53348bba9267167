"""Trains a small student by stage 1 and stage 2 and a small Transition Model, alone or as one of several processes.

python distill_worker.py RUN: metrics go to RUN/stage1, RUN/stage1-whole (not sharded), RUN/stage2 and
RUN/tim. Not a test itself: it is run by
`test_distill_parallel.py`.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.helpers.tim_models import randomised
from tests.helpers.tim_training import CONFIG, settings
from tests.helpers.tim_training import Data as Stills
from tmd_ref.distill.data import LatentDataset
from tmd_ref.distill.discriminator import Discriminator
from tmd_ref.distill.parallel import World, place
from tmd_ref.distill.stage1 import tm_meanflow_loss
from tmd_ref.distill.stage2 import Stage2
from tmd_ref.distill.tim import tim_loss
from tmd_ref.distill.trainer import AveragedWeights, Run, Schedule, train
from tmd_ref.student import TMDStudent
from tmd_ref.wan import WanConfig, WanTransformer, rope_tables

SMALL = WanConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=3, text_dim=8, text_len=4)
SCHEDULE = Schedule(steps=4, lr=1e-3, warmup=0, ema=0.5)


class Data(LatentDataset):
    """Random latents and embeddings in place of prepared shards."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.clips = torch.randn(8, 16, 3, 4, 4, generator=generator)
        self.prompts = torch.randn(8, 4, 8, generator=generator)
        self.null_embeds = torch.randn(4, 8, generator=generator)

    def sample(self, draws):
        index = draws.integers(8)
        return self.clips[index], self.prompts[index]

    def rope(self, config, device=None):
        return rope_tables(3, 2, 2, config.head_dim)


def teacher():
    torch.manual_seed(0)
    wan = WanTransformer(SMALL)
    nn.init.normal_(wan.head.head.weight, std=0.1)
    return wan


def main(folder: Path, world: World = World(), stop_at: int | None = None) -> None:  # noqa: B008
    """`stop_at`: the step of stage 2 at which to be interrupted."""
    recompute = world.size > 1
    options: dict[str, Any] = {"batch": 4, "log_every": 1, "save_every": 2, "world": world, "report": lambda line: None}
    for name, shard in (("stage1", True), ("stage1-whole", False)):
        student = place(TMDStudent.from_teacher(teacher(), 1), world, recompute, shard=shard)
        loss = tm_meanflow_loss(student, Data(), 2, 2, guidance=2.0)
        train({"student": (student, SCHEDULE)}, loss, Run(folder / name, **options))

    torch.manual_seed(0)
    networks = {
        "generator": place(TMDStudent.from_teacher(teacher(), 1), world, recompute),
        "fake": place(teacher(), world, recompute),
        "discriminator": place(Discriminator(SMALL, 2), world, recompute),
    }
    fixed = place(teacher().requires_grad_(False), world, recompute)
    objective = Stage2(networks["generator"], fixed, networks["fake"], networks["discriminator"], Data(), 2,
                       depths=(0, 2), ratio=1)  # fmt: skip

    def interrupted(draws):
        if draws.step == stop_at:
            raise KeyboardInterrupt
        return objective(draws)

    pairs = {name: (network, SCHEDULE) for name, network in networks.items()}
    train(pairs, interrupted, Run(folder / "stage2", **options), objective.turn)

    tim = place(randomised(CONFIG).requires_grad_(True), world, recompute)
    averaged = AveragedWeights()
    loss = tim_loss(tim, Stills(), settings(guided={"weight": 0.5, "after": 1}), averaged)
    train({"tim": (tim, SCHEDULE)}, loss, Run(folder / "tim", **options), averaged=averaged)


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = World.start()
    main(Path(sys.argv[1]), here)
    here.stop()
