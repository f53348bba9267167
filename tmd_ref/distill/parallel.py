"""One process or many: who trains on which samples, and networks whose weights lie in pieces on several devices.

Many processes are started by `torchrun`. Every network is then sharded by torch's FSDP2 (`fully_shard`), one unit per
transformer block and one for the rest; or, if it is small, held whole by each process, and gradients are averaged. What
it is not: tensor, context or pipeline parallelism.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tmd_ref.student import GatedFusion
from tmd_ref.tim.model import Block as TiMBlock
from tmd_ref.wan import Block

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes that train together; the default is one alone on the CPU."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @classmethod
    def start(cls, device: str = "cpu") -> World:
        """Join the processes that torchrun started, if it did. `device`: cpu or cuda; with cuda, one GPU per process.

        Raises ValueError if CUDA is asked for and there is none.
        """
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device {device!r}: choose cpu or cuda.")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: torch sees no NVIDIA GPU here. Install torch's CUDA build, or take cpu.")
        size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
        place = torch.device(device, local) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(place)
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        return cls(dist.get_rank() if size > 1 else 0, size, place)

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def parts(self, batch: int, micro: int | None) -> list[list[int]]:
        """This process's samples of a step, cut into micro-batches of `micro` (None: one piece).

        Raises ValueError if the batch does not divide evenly, which would weigh samples unevenly.
        """
        if batch % self.size or (micro and (batch // self.size) % micro):
            raise ValueError(
                f"a batch of {batch} does not divide into {self.size} processes with micro-batches of {micro}: "
                "choose a multiple of their product."
            )
        own = list(range(self.rank, batch, self.size))
        step = micro or len(own)
        return [own[i : i + step] for i in range(0, len(own), step)]

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes of a tensor that each one has."""
        if self.size == 1:
            return value
        total = value.detach().clone().to(self.device)
        dist.all_reduce(total)
        return total / self.size

    def agree(self, failed: bool) -> bool:
        """Whether any process failed: all stop together, or those left would wait for ever."""
        return bool(self.mean(torch.tensor(float(failed))) > 0) if self.size > 1 else failed

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def stop(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


class Shell(nn.Module):
    """A network that is used through functions: `shell(run)` gives run(network).

    FSDP gathers the weights that belong to no block when the forward of its root is called; a student's backbone and
    head are called one by one and share some of them. Inside `run` they may be called in any order and number.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, run: Callable[[Any], Any]) -> Any:
        return run(self.network)


def within(network: Any, run: Callable[[Any], Result]) -> Result:
    """run(network), with the network's weights at hand if it is sharded."""
    return network(run) if isinstance(network, Shell) else run(network)


def bare(network: Any) -> Any:
    """The network itself, without the shell."""
    return network.network if isinstance(network, Shell) else network


def recompute_activations(network: nn.Module) -> None:
    """Keep only the inputs of transformer blocks and fusion for the backward pass and compute the rest again."""
    for module in network.modules():
        if isinstance(module, (Block, TiMBlock, GatedFusion)):
            setattr(module, "forward", functools.partial(checkpoint, module.forward, use_reentrant=False))  # noqa: B010


def average_gradients(weights: Iterable[Tensor], world: World) -> None:
    """Gradients of weights that every process holds whole become their mean; sharded ones are that already."""
    if world.size == 1:
        return
    gradients = [w.grad for w in weights if w.grad is not None and local(w) is w]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        pieces = (flat / world.size).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])


def place(
    network: nn.Module, world: World, recompute: bool = False, bf16: bool = False, shard: bool = True
) -> nn.Module:
    """Bring a network to the world's device, sharded if there are several processes and `shard`.

    Master weights, gradients' sums and optimizer are float32 as stored; with `bf16`, blocks are gathered and computed
    in bfloat16, everything else (time embedding, modulation, norms, output layer) in float32 under autocast.
    Every process must hold the same weights when it calls this.
    """
    if recompute:
        recompute_activations(network)
    if world.size == 1 or not shard:
        return network.to(world.device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    # inputs keep their type: the residual stream and times stay float32, the layers cast by themselves
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(cast_forward_inputs=False)
    shell = Shell(network)
    for module in network.modules():
        if isinstance(module, TiMBlock) and module.cross_attn is not None:
            # used apart from their block, once per prompt
            fully_shard([module.cross_attn.kv, module.cross_attn.k_norm], mesh=mesh, mp_policy=full)
        if isinstance(module, (Block, TiMBlock)):
            fully_shard(module, mesh=mesh, mp_policy=half if bf16 else full)
    fully_shard(shell, mesh=mesh, mp_policy=full)
    return shell


def autocast(world: World, bf16: bool) -> torch.autocast:
    """Matrix products in bfloat16; the places where Wan stays in float32 leave it by themselves."""
    return torch.autocast(world.device.type, torch.bfloat16, enabled=bf16)


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a sharded tensor; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local else tensor


def let_go(network: nn.Module) -> None:
    """Forget what a sharded network has gathered (a pass without gradient keeps some): its pieces have changed."""
    for module in network.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor. Every process must call it."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return full_tensor() if full_tensor else tensor


def fill(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy whole tensors into `tensors`, which may be sharded; each process reads its piece, nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            if isinstance(tensor, DTensor):
                value = distribute_tensor(
                    value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
                )
            tensor.copy_(value)
