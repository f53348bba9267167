"""LoRAs of a small Wan transformer as files: random matrices, the layouts in which they are published, the sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.helpers import synthetic_checkpoints as made
from tmd_export.checkpoints.names import converted

State = dict[str, Tensor]
ATTENTION = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
BLOCK_LAYERS = [f"blocks.{n}.{part}" for n in range(made.WAN.num_layers) for part in (*ATTENTION, "ffn.0", "ffn.2")]
EMBEDDINGS = [f"{name}.{n}" for name in ("text_embedding", "time_embedding") for n in (0, 2)]
RANK, ALPHA = 4, 6.0


@dataclass
class Made:
    """By layers of the original layout: pairs (up, down), an alpha for all of them or none, whole differences."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    alpha: float | None = None
    diff: State = field(default_factory=dict)
    diff_b: State = field(default_factory=dict)

    def merged(self, weights: Mapping[str, Tensor], strength: float = 1.0) -> State:
        """The closed form in float64, by the names of `weights`."""
        result = {name: weight.double() for name, weight in weights.items()}
        for layer, (up, down) in self.pairs.items():
            scale = strength * (1.0 if self.alpha is None else self.alpha / down.shape[0])
            target = f"{layer}.weight"
            product = up.double().flatten(1) @ down.double().flatten(1)
            result[target] = result[target] + scale * product.reshape(result[target].shape)
        for layer, diff in self.diff.items():
            target = f"{layer}.weight" if f"{layer}.weight" in result else layer
            result[target] = result[target] + strength * diff.double()
        for layer, diff in self.diff_b.items():
            result[f"{layer}.bias"] = result[f"{layer}.bias"] + strength * diff.double()
        return result

    def tensors(
        self,
        rename: Callable[[str], str] = lambda layer: f"diffusion_model.{layer}",
        suffixes: tuple[str, str] = (".lora_up.weight", ".lora_down.weight"),
    ) -> State:
        """As a file holds them: `rename` makes a layer's name in the file, `suffixes` are those of up and down."""
        state: State = {}
        for layer, (up, down) in self.pairs.items():
            state[rename(layer) + suffixes[0]], state[rename(layer) + suffixes[1]] = up, down
            if self.alpha is not None:
                state[f"{rename(layer)}.alpha"] = torch.tensor(self.alpha)
        state |= {f"{rename(layer)}.diff": diff for layer, diff in self.diff.items()}
        return state | {f"{rename(layer)}.diff_b": diff for layer, diff in self.diff_b.items()}


def weights(wan22: bool = False) -> State:
    """The transformer that they are for."""
    return made.models(wan22).state("transformer")


def random_lora(
    layers: list[str] = BLOCK_LAYERS,
    alpha: float | None = ALPHA,
    *,
    diff: tuple[str, ...] = (),
    diff_b: tuple[str, ...] = (),
    seed: int = 1,
    rank: int = RANK,
    dtype: torch.dtype = torch.float32,
    wan22: bool = False,
) -> Made:
    """Differences about as large as the weights."""
    generator = torch.Generator().manual_seed(seed)
    base = weights(wan22)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    pairs = {}
    for layer in layers:
        out, *inputs = base[f"{layer}.weight"].shape
        up = random(out, rank, *(1 for _ in inputs[1:])) / rank
        pairs[layer] = (up.to(dtype), random(rank, *inputs).mul_(torch.tensor(inputs).prod() ** -0.5).to(dtype))

    def whole(name: str) -> Tensor:
        shape = base[name].shape
        return (random(*shape) * shape[1:].numel() ** -0.5).to(dtype)

    return Made(
        pairs,
        alpha,
        {layer: whole(f"{layer}.weight" if f"{layer}.weight" in base else layer) for layer in diff},
        {layer: whole(f"{layer}.bias") for layer in diff_b},
    )


def in_diffusers(layer: str) -> str:
    """A layer's name in the layout of diffusers."""
    return converted("transformer", f"{layer}.weight").removesuffix(".weight")


def flat(layer: str) -> str:
    """A layer as kohya's trainers and musubi call it."""
    return f"lora_unet_{layer.replace('.', '_')}"
