"""Knowledge distillation: the warm-up of the one-step DMD2-v baseline on noise-clip pairs of the teacher  (TMD §3.2).

TMD needs none. Choices where the paper is silent: pairs are made by the teacher's own sampler, the skipped layer is
skipped in the pass of the negative prompt, the loss is the mean square error of latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmd_ref.distill.data import LatentDataset, write_index, write_shard
from tmd_ref.distill.discriminator import teacher_pass
from tmd_ref.distill.draws import Draws
from tmd_ref.distill.parallel import World, bare, within
from tmd_ref.distill.stage2 import predict_clip
from tmd_ref.distill.trainer import Objective
from tmd_ref.samplers import shift_grid, unipc_sample


def pair_noise(seed: int, numbers: list[int], shape: tuple[int, ...]) -> Tensor:
    """The noise of pairs, `[len(numbers), *shape]`: made again from the number instead of stored."""
    return torch.cat([Draws(seed, number).normal(shape) for number in numbers])


@torch.no_grad()
def write_pairs(
    folder: Path, teacher: Any, data: LatentDataset, count: int, seed: int, *, steps: int = 50, shift: float = 5.0,
    guidance: float = 5.0, skip: tuple[int, ...] = (), batch: int = 8, shard: int = 64, world: World = World(),  # noqa: B008
    report=print,
) -> None:  # fmt: skip
    """The teacher's clips for `count` prompts of the data -> shards in `folder`, as those of the data but one caption
    each; shards that are there are kept. Clip number i comes from `pair_noise(seed, [i])`."""
    folder.mkdir(parents=True, exist_ok=True)
    rope = data.rope(bare(teacher).config, world.device)
    null = data.null_embeds.to(world.device)
    for first in range(0, count, shard):
        path = folder / f"{first:08d}.safetensors"
        if path.exists():
            continue
        latents, embeds = [], []
        for start in range(first, min(first + shard, count), batch):
            numbers = list(range(start, min(start + batch, first + shard, count)))
            prompts = torch.stack([data.embeds(n % len(data)) for n in numbers]).to(world.device)
            negative = null.expand_as(prompts)

            def velocity(x: Tensor, t: Tensor, prompt: Tensor, negative: Tensor = negative) -> Tensor:
                left_out = skip if prompt is negative else ()
                return within(teacher, lambda net: teacher_pass(net, x, t, prompt, rope, skip=left_out)[0])

            noise = pair_noise(seed, numbers, data.shape).to(world.device)
            latents.append(unipc_sample(velocity, noise, prompts, negative, steps, shift, guidance).cpu())
            embeds.append(prompts.unsqueeze(1).cpu())
        if world.first:
            write_shard(path, torch.cat(latents), torch.cat(embeds), null)
            report(f"{min(first + shard, count)}/{count} pairs")
        world.wait()
    if world.first:
        write_index(folder, {"pairs": count, "seed": seed, "steps": steps, "shift": shift, "guidance": guidance})
    world.wait()


def kd_loss(generator: Any, pairs: LatentDataset, seed: int, outer_shift: float = 10.0) -> Objective:
    """Mean square error of the one-step clip g(noise, 0.999) to the teacher's. `seed`: that of the pairs."""
    t_max = float(shift_grid(1, outer_shift)[1])
    config = bare(generator).config

    def loss(draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        numbers = draws.integers(len(pairs)).tolist()
        clips = torch.stack([pairs.latents(n) for n in numbers]).to(draws.device)
        prompts = torch.stack([pairs.embeds(n) for n in numbers]).to(draws.device)
        noise = pair_noise(seed, numbers, pairs.shape).to(draws.device)
        t = noise.new_full((len(noise),), t_max)
        rope = pairs.rope(config, noise.device)
        made = within(generator, lambda net: predict_clip(net, noise, t, prompts, rope))
        return (made - clips).square().mean(), {}

    return loss
