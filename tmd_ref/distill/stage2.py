"""Stage 2: DMD2-v, with the flow head unrolled  (TMD §3.2, A.3; Algorithm 2, stage two).

Four networks: the generator, the frozen teacher, the fake score that follows the generator's distribution, and the
discriminator. The generator is a TMD student, whose inner flow runs with gradient through all its steps, or, for the
baseline "DMD2-v", a Wan transformer without flow head. Both begin at real latents noised to a node of the outer grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tmd_ref.distill.data import LatentDataset
from tmd_ref.distill.discriminator import discriminator_loss, generator_loss, teacher_pass
from tmd_ref.distill.draws import Draws, like, mix
from tmd_ref.distill.parallel import bare, within
from tmd_ref.samplers import inner_flow, shift_grid
from tmd_ref.student import TMDStudent
from tmd_ref.wan import WanTransformer

Rope = tuple[Tensor, Tensor]
NORMALISERS = ("x0", "score")


def rollout(
    student: TMDStudent, x_t: Tensor, t: Tensor, x1: Tensor, y1: Tensor, prompt_embeds: Tensor, rope: Rope,
    grid: np.ndarray,
) -> Tensor:  # fmt: skip
    """A student's clip: x1 - y, y at the end of the inner flow from y1 along `grid`  (TMD Eq. 15). Shape of x_t.

    x1 is the noise in x_t. The gradient passes through every inner step and the backbone.
    """
    features, context = student.backbone(x_t, t, prompt_embeds, *rope)
    return x1 - inner_flow(student.head, y1, grid, features, context, *rope)


def predict_clip(model: WanTransformer, x_t: Tensor, t: Tensor, prompt_embeds: Tensor, rope: Rope) -> Tensor:
    """The clip that a velocity points to: x_t - t·v  (TMD Eq. 17)."""
    return x_t - like(t, x_t) * model(x_t, t, prompt_embeds, rope)


def vsd_gradient(clip: Tensor, by_fake: Tensor, by_teacher: Tensor, normaliser: str) -> Tensor:
    """The direction in which a clip should not move, `[B, ...]`: (g_fake - g_teacher) / its sample's normaliser.

    Normalisers: "score", the paper's ‖g_fake - g_teacher‖₁ (every sample's gradient has the same length, also where
    both scores agree and nothing but their noise is left); "x0", DMD's and FastGen's ‖clip - g_teacher‖₁ (it vanishes
    where they agree). Sums over the elements of a sample, so that this is the gradient of a sample's summed loss.
    """
    difference = by_fake - by_teacher
    scale = difference if normaliser == "score" else clip - by_teacher
    return difference / like(scale.abs().flatten(1).sum(1).clamp_min(1e-6 * scale[0].numel()), clip)


@dataclass(frozen=True)
class Stage2:
    """The objective of stage 2; `turn` goes with it into `train`.

    Choices where the paper is silent: one noisy clip (t, noise) serves score, guidance and discriminator; real and
    generated clips get the same t and noise; the fake score's loss is the plain mean square in its x0 form; the
    generator is updated in the last of every `ratio + 1` steps. `discriminator` None: no GAN, so that `gan_weight`
    and `depths` say nothing, and most of the teacher's passes fall away.
    """

    generator: Any
    teacher: Any
    fake: Any
    discriminator: Any
    data: LatentDataset
    outer_steps: int
    inner_steps: int = 2  # of the rollout; no part of the baseline
    guidance: float = 5.0
    gan_weight: float = 0.03
    depths: Sequence[int] = (15, 22, 29)
    ratio: int = 4
    normaliser: str = "score"
    shifts: tuple[float, float, float] = (10.0, 10.0, 5.0)  # outer grid, inner grid, noise of the scores

    def __post_init__(self) -> None:
        if self.normaliser not in NORMALISERS:
            raise ValueError(f"normaliser {self.normaliser!r}: choose one of {', '.join(NORMALISERS)}.")

    def turn(self, step: int) -> tuple[str, ...]:
        """Who learns in a step: the fake score and the discriminator `ratio` times, then the generator once."""
        if step % (self.ratio + 1) == self.ratio:
            return ("generator",)
        return ("fake",) if self.discriminator is None else ("fake", "discriminator")

    def __call__(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        x, prompt_embeds = self.data.sample(draws)
        rope = self.data.rope(bare(self.teacher).config, x.device)
        generate = self._generator(draws, x, prompt_embeds, rope)
        t, noise = draws.times(self.shifts[2]), draws.normal(x.shape[1:])
        if self.turn(draws.step) == ("generator",):
            return self._generator_turn(generate(), t, noise, prompt_embeds, rope)
        with torch.no_grad():
            clip = generate()
        return self._critics_turn(x, clip, t, noise, prompt_embeds, rope)

    def _generator(self, draws: Draws, x: Tensor, prompt_embeds: Tensor, rope: Rope) -> Callable[[], Tensor]:
        """The generator's clip from x noised to a random node of the outer grid."""
        grid = torch.from_numpy(shift_grid(self.outer_steps, self.shifts[0])).to(x)
        t = grid[1 + draws.integers(self.outer_steps)]
        x1, y1 = draws.normal(x.shape[1:]), draws.normal(x.shape[1:])
        x_t = mix(x, x1, t)
        if not isinstance(bare(self.generator), WanTransformer):
            inner = shift_grid(self.inner_steps, self.shifts[1])
            return lambda: within(self.generator, lambda g: rollout(g, x_t, t, x1, y1, prompt_embeds, rope, inner))
        return lambda: within(self.generator, lambda g: predict_clip(g, x_t, t, prompt_embeds, rope))

    def _generator_turn(
        self, clip: Tensor, t: Tensor, noise: Tensor, prompt_embeds: Tensor, rope: Rope
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient with respect to the clip is worked out first, then passed on: (clip · sg(gradient)).

        So the critics' and the teacher's weights get no gradient, and their activations are gone when the
        generator's backward pass begins.
        """
        leaf = clip.detach()
        scalars, gan_gradient = {}, None
        if self.discriminator is None:
            noisy = mix(leaf, noise, t)
            with torch.no_grad():
                velocity = within(self.teacher, lambda net: net(noisy, t, prompt_embeds, rope))
        else:
            noisy, velocity, gan, gan_gradient = self._judged(leaf, t, noise, prompt_embeds, rope)
            scalars["gan_generator"] = gan
        with torch.no_grad():
            if self.guidance != 1:
                null = self.data.null_embeds.to(clip.device).expand_as(prompt_embeds)
                negative = within(self.teacher, lambda net: net(noisy, t, null, rope))
                velocity = negative + self.guidance * (velocity - negative)
            by_teacher = noisy - like(t, noisy) * velocity
            by_fake = within(self.fake, lambda net: predict_clip(net, noisy, t, prompt_embeds, rope))
            gradient = vsd_gradient(leaf, by_fake, by_teacher, self.normaliser) / len(clip)
        scalars |= {
            "score_gap": (by_fake - by_teacher).square().mean(),
            "teacher_gap": (leaf - by_teacher).square().mean(),
            # mean sizes of the two gradients, and of the clip's values (about 1 in normalised latents)
            "vsd_size": gradient.abs().mean() * len(clip),
            "clip_square": leaf.square().mean(),
        }
        if gan_gradient is not None:
            scalars["gan_size"] = self.gan_weight * gan_gradient.abs().mean() * len(clip)
            gradient = gradient + self.gan_weight * gan_gradient
        return (clip * gradient).sum(), scalars

    def _judged(
        self, clip: Tensor, t: Tensor, noise: Tensor, prompt_embeds: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The noisy clip, the teacher's velocity there, the generator's part of the GAN and its gradient."""
        leaf = clip.clone().requires_grad_()
        with torch.enable_grad():
            noisy = mix(leaf, noise, t)
            velocity, features = within(
                self.teacher, lambda net: teacher_pass(net, noisy, t, prompt_embeds, rope, self.depths)
            )
            gan = generator_loss(within(self.discriminator, lambda net: net(features)))
            (gradient,) = torch.autograd.grad(gan, leaf)
        return noisy.detach(), velocity.detach(), gan.detach(), gradient

    def _critics_turn(
        self, x: Tensor, clip: Tensor, t: Tensor, noise: Tensor, prompt_embeds: Tensor, rope: Rope
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising score matching on generated clips, and real against generated ones by the teacher's features."""
        noisy = mix(clip, noise, t)
        by_fake = within(self.fake, lambda net: predict_clip(net, noisy, t, prompt_embeds, rope))
        score = (by_fake - clip).square().mean()
        if self.discriminator is None:
            return score, {"fake_score": score}
        noisy_real = mix(x, noise, t)
        with torch.no_grad():
            _, of_fake = within(self.teacher, lambda net: teacher_pass(net, noisy, t, prompt_embeds, rope, self.depths))
            _, of_real = within(
                self.teacher, lambda net: teacher_pass(net, noisy_real, t, prompt_embeds, rope, self.depths)
            )
        # one call: a sharded network gathers its weights once
        logits = within(self.discriminator, lambda net: torch.stack([net(of_real), net(of_fake)]))
        gan = discriminator_loss(logits[0], logits[1])
        with torch.no_grad():
            right = ((logits[0] > 0).float().mean() + (logits[1] < 0).float().mean()) / 2
        return score + gan, {"fake_score": score, "gan_critic": gan, "critic_right": right}
