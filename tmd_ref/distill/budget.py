"""What a distillation needs, on paper: memory per GPU and floating-point work, from the sizes in a config.

A formula, not a measurement. Assumptions, each in one place below:
- FSDP2 over all GPUs: weights, gradients and optimizer of every network in G pieces; while a block runs, it and the
  next one are whole; what lies outside the blocks is gathered once per pass and kept.
- Trained networks: float32 weights, gradients and two Adam moments. The teacher: bfloat16 blocks.
- Activations per micro-batch with a checkpoint at every block and fusion: the inputs of everything that is in one
  backward pass (float32 residual stream), the insides of one block, and the largest activation of the discriminator.
- Work: 2 operations per weight and token in a matrix product, 4·N²·D per self-attention; a backward pass is two
  forward passes, recomputation one more; VAE and text encoder are not counted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from tmd_ref.distill.config import Config
from tmd_ref.distill.discriminator import SCALES, count_parameters
from tmd_ref.student import TMDStudent
from tmd_ref.wan import Block, WanConfig, WanTransformer

GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Parameters of the networks and the work of one block."""

    wan: int
    student: int
    block: int
    rest: int  # of a Wan transformer, outside its blocks
    student_rest: int
    discriminator: int
    tokens: int
    block_flops: float  # one block, one clip, forward
    fusion_flops: float


@dataclass(frozen=True)
class Need:
    """Bytes per GPU of one network in one stage."""

    network: str
    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    gathered: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.gathered


def sizes(config: Config) -> Sizes:
    """Counted on networks without storage."""
    wan: WanConfig = config.wan
    frames, height, width = config.data.latent_size
    tokens = frames * (height // wan.patch_size[1]) * (width // wan.patch_size[2])
    block, whole, student = _parameters(wan, max(1, config.student.head_blocks), config.student.fusion)
    dim = wan.dim
    linears = 2 * tokens * (6 * dim * dim + 2 * dim * wan.ffn_dim) + 2 * wan.text_len * 2 * dim * dim
    attention = 4 * tokens * dim * (tokens + wan.text_len)
    return Sizes(
        whole, student, block, whole - wan.num_layers * block, student - wan.num_layers * block,
        count_parameters(wan, depths=len(config.stage2.depths), reduction=config.stage2.reduction), tokens,
        linears + attention, 4 * tokens * dim * wan.ffn_dim,
    )  # fmt: skip


@functools.cache
def _parameters(wan: WanConfig, head_blocks: int, fusion: str) -> tuple[int, int, int]:
    """Of a block, a Wan transformer and a student."""
    with torch.device("meta"):
        networks = Block(wan), WanTransformer(wan), TMDStudent(wan, head_blocks, fusion)
    block, whole, student = (sum(p.numel() for p in network.parameters()) for network in networks)
    return block, whole, student


def trained(name: str, parameters: int, block: int, rest: int, gpus: int, gather_bytes: int) -> Need:
    """A network with float32 weights (4 bytes), gradients (4) and Adam moments (8), gathered block by block."""
    share = parameters / gpus
    return Need(name, 4 * share, 4 * share, 8 * share, 2 * gather_bytes * block + (4 * rest if gpus > 1 else 0))


def memory(config: Config, gpus: int) -> dict[str, list[Need]]:
    """Per stage, what each network takes on each of `gpus` GPUs, without activations."""
    n = sizes(config)
    student = (n.student, n.block, n.student_rest) if config.student.is_tmd else (n.wan, n.block, n.rest)
    fixed = Need("teacher", (2 * (n.wan - n.rest) + 4 * n.rest) / gpus, gathered=4 * n.block + 4 * n.rest)
    judge = trained("discriminator", n.discriminator, 0, n.discriminator, gpus, 2)
    return {
        "stage1": [trained("student", *student, gpus, 4)],
        "stage2": [trained("generator", *student, gpus, 2), trained("fake score", n.wan, n.block, n.rest, gpus, 2),
                   fixed, judge],
    }  # fmt: skip


def activations(config: Config) -> dict[str, float]:
    """Bytes of activations of one micro-batch per stage, at its fullest moment, with recomputation."""
    n, wan = sizes(config), config.wan
    stream = 4 * n.tokens * wan.dim  # float32, one block's input
    # inside one block: normed, q, k, v, rotated q and k, attention's output in 2 or 4 bytes, and the wide layer twice
    inside = n.tokens * (30 * wan.dim + 4 * wan.ffn_dim)
    heads, inner = config.student.head_blocks, config.student.inner_steps
    rollout = wan.num_layers + (inner - 1) * heads if config.student.is_tmd else wan.num_layers
    rollout += inner if config.student.is_tmd else 0  # the tokens of y that enter each fusion
    first = ((wan.num_layers + 1) * stream + inside) * (config.stage1.micro or 1)
    width = wan.dim // 4 // config.stage2.reduction
    frames, height, width_px = config.data.latent_size
    # five branches: convolution, norm and ReLU at full size, then at an eighth and less; two clips in the critics' turn
    branches = sum(3 * 4 * width * frames * height * width_px / (1 if s == 1 else s**3) for s in SCALES)
    judge = len(config.stage2.depths) * (len(SCALES) * 3 * 4 * width * frames * height * width_px + branches)
    generator = (rollout * stream + inside) + max(wan.num_layers * stream + inside, judge)
    critics = wan.num_layers * stream + inside + 2 * judge
    return {"stage1": first, "stage2": max(generator, critics) * (config.stage2.micro or 1)}


def work(config: Config) -> dict[str, float]:
    """Operations per stage, for all its steps and clips."""
    n, wan, s = sizes(config), config.wan, config.student
    layers, heads, inner = wan.num_layers, s.head_blocks, s.inner_steps
    full = layers * n.block_flops
    again = 1 if config.machine.recompute else 0
    grad = 3 + again  # a pass that is trained, in units of its forward pass
    result = {}
    if s.is_tmd:
        head = heads * n.block_flops + n.fusion_flops
        backbone = (layers - heads) * n.block_flops
        one = grad * (backbone + head)
        guidance = 0 if config.stage1.guidance == 1 else backbone + head
        difference = 0 if config.stage1.objective == "tm" else 2 * head
        result["stage1"] = config.stage1.steps * config.stage1.batch * (one + guidance + difference)
        make = backbone + inner * head
    else:
        make = full
    two = config.stage2
    student_updates = two.steps // (two.ratio + 1)
    generator = grad * make + (2 + again) * full + full * (two.guidance != 1) + full
    critics = make + grad * full + 2 * full
    result["stage2"] = two.batch * (student_updates * generator + (two.steps - student_updates) * critics)
    return result


def describe(config: Config, gpus: int, rate: float = 350e12) -> str:
    """Tables for a terminal; `rate`: operations per second that a GPU is taken to reach."""
    lines = [f"{config.model}, {gpus} GPUs, GiB per GPU (formula, not measured):"]
    lines.append(f"{'':8}{'network':<15}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'gathered':>10}{'total':>8}")
    acts, operations = activations(config), work(config)
    for stage, needs in memory(config, gpus).items():
        for need in needs:
            values = (need.weights, need.gradients, need.optimizer, need.gathered, need.total)
            lines.append(f"{stage:8}{need.network:<15}" + "".join(
                f"{value / GIB:>{wide}.1f}"
                for value, wide in zip(values, (9, 11, 11, 10, 8), strict=True)))  # fmt: skip
        total = sum(need.total for need in needs) + acts[stage]
        lines.append(f"{stage:8}activations of a micro-batch {acts[stage] / GIB:.1f}; together {total / GIB:.1f}")
    for stage, count in operations.items():
        hours = count / rate / gpus / 3600
        lines.append(f"{stage}: {count:.2e} operations, {hours:.0f} h at {rate / 1e12:.0f} TFLOP/s per GPU")
    return "\n".join(lines)
