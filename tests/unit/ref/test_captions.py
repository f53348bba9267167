"""Captions: what they say is what their scene has, and what they leave out is the default."""

import numpy as np
import pytest

from tmd_ref.captions import default, typed_caption
from tmd_ref.distill.evaluate import as_typed
from tmd_ref.distill.text import ATTRIBUTES, draw_captions
from tmd_ref.scenes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, combinations, sample_scene

SILENT = Scene("circle", "white", "black", "right", "medium", "normal")


def test_a_typed_caption_leaves_out_only_what_is_the_default() -> None:
    rng = np.random.default_rng(0)
    scene = Scene("square", "magenta", "navy", "down", "large", "slow")
    for _ in range(500):
        words = typed_caption(scene, rng).strip(".").replace(",", "").split()
        for said in (
            {"square", "box", "block", "cube"}, {"magenta", "pink", "purple", "violet"}, {"navy", "blue"},
            {"down", "downwards", "downward", "bottom", "falling", "falls", "dropping", "drops", "sinking"},
            {"large", "big", "huge"}, {"slow", "slowly"},
        ):  # fmt: skip
            assert said & set(words), words


def test_a_scene_of_defaults_is_said_in_few_words_and_never_in_none() -> None:
    rng = np.random.default_rng(1)
    captions = [typed_caption(SILENT, rng) for _ in range(500)]
    lengths = [len(text.split()) for text in captions]
    assert min(lengths) >= 1 and all(text.strip(".,") for text in captions)
    assert np.mean(np.array(lengths) <= 3) > 0.2


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_defaults_are_a_scene_that_a_clip_can_show(motion: str) -> None:
    shape, color, background = (default(name, motion) for name in ("shape", "color", "background"))
    assert (shape, color, background, motion) in combinations(True) + combinations(False)


def test_training_draws_plain_and_typed_captions_of_scenes_that_exist() -> None:
    rng = np.random.default_rng(2)
    scenes, captions = draw_captions(rng, 2000)
    for scene in scenes:
        assert all(getattr(scene, name) in values for name, values in ATTRIBUTES.items())
        assert (scene.shape, scene.motion) != ("circle", "spinning")
    assert len(set(captions)) > 1500


def test_hard_scenes_come_oftener_in_training_and_not_when_held_out() -> None:
    rng = np.random.default_rng(3)
    for hard in ({"spinning"}, {"star"}, {"green", "gray"}):
        trained, held_out = (
            np.mean([hard <= {*sample_scene(rng, held_out).combination} for _ in range(3000)])
            for held_out in (False, True)
        )
        assert trained > 1.3 * held_out > 0, hard


def test_the_prompts_written_by_hand_are_a_hundred_that_cover_every_value() -> None:
    scenes, prompts = as_typed()
    assert len(set(prompts)) == len(scenes) == 100
    for name, values in (("shape", SHAPES), ("color", COLORS), ("background", BACKGROUNDS), ("motion", MOTIONS)):
        assert {getattr(scene, name) for scene in scenes} == set(values)
