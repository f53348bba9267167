"""tmd_ref's flow map against diffusers' AnyFlow transformer, with random weights carried over."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.flow_maps import CONFIG, random_flow_map, theirs_of
from tmd_ref.flow_map import FlowMapWan, SplitFlowMap

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def models() -> tuple[FlowMapWan, Any]:
    ours = random_flow_map()
    return ours, theirs_of(ours)


@pytest.mark.parametrize(
    ("batch", "frames", "height", "width", "text"), [(2, 5, 8, 8, 12), (1, 3, 6, 10, 12), (3, 1, 12, 4, 7)]
)
@torch.no_grad()
def test_mean_velocity_equals_diffusers(
    models: tuple[FlowMapWan, Any], batch: int, frames: int, height: int, width: int, text: int
) -> None:
    ours, theirs = models
    generator = torch.Generator().manual_seed(batch * frames + width)
    x = torch.randn(batch, 16, frames, height, width, generator=generator)
    t = torch.rand(batch, generator=generator)
    r = t * torch.rand(batch, generator=generator)
    prompt_embeds = torch.randn(batch, text, CONFIG.text_dim, generator=generator)

    def per_frame(time: torch.Tensor) -> torch.Tensor:
        return (1000 * time)[:, None].expand(batch, frames)

    def diffusers_velocity(r: torch.Tensor) -> torch.Tensor:
        times = {"timestep": per_frame(t), "r_timestep": per_frame(r)}
        (found,) = theirs(x.transpose(1, 2), **times, encoder_hidden_states=prompt_embeds, return_dict=False)
        return torch.as_tensor(found).transpose(1, 2)

    velocity = ours(x, t, r, prompt_embeds)
    torch.testing.assert_close(velocity, diffusers_velocity(r), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(velocity, diffusers_velocity(t), atol=1e-2), "r plays no part"


@torch.no_grad()
def test_both_parts_are_the_whole(models: tuple[FlowMapWan, Any]) -> None:
    ours, _ = models
    x, prompt_embeds = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 5, CONFIG.text_dim)
    t, r = torch.tensor([0.7]), torch.tensor([0.2])
    torch.testing.assert_close(SplitFlowMap(ours, 1)(x, t, r, prompt_embeds), ours(x, t, r, prompt_embeds))
