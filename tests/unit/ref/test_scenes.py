"""The rendered data, and the oracle that reads it back: each is checked with the other and with closed forms."""

import numpy as np
import pytest

from tmd_ref.captions import caption
from tmd_ref.oracle import read_clip
from tmd_ref.scenes import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    Scene,
    area,
    combinations,
    coverage,
    render,
    sample_scene,
    tracks,
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("angle", [0.0, 0.4])
def test_coverage_has_the_area_of_the_shape(shape, angle):
    one = np.array([1.0])
    cover = coverage(shape, 40 * one, 101.3 * one, 99.6 * one, angle * one, (200, 200))
    assert cover.shape == (1, 200, 200) and cover.dtype == np.float32
    assert cover.sum() == pytest.approx(area(shape) * 40**2, rel=0.01)


def test_a_square_of_radius_one_has_the_area_of_a_square():
    # the half diagonal is 1.25
    assert area("square") == pytest.approx(2 * 1.25**2)


def test_held_out_and_training_combinations_are_disjoint_and_cover_every_value():
    train, test = set(combinations(False)), set(combinations(True))
    assert not train & test
    assert len(train | test) == 4 * 8 * 3 * 8 - 8 * 3  # without spinning circles
    assert 0.1 < len(test) / len(train | test) < 0.15
    for values in (train, test):
        for position, names in enumerate((SHAPES, COLORS, BACKGROUNDS, MOTIONS)):
            assert {combination[position] for combination in values} == set(names)


def test_the_same_seed_gives_the_same_scene_caption_and_clip():
    first, second = ((np.random.default_rng(3)) for _ in range(2))
    a, b = sample_scene(first), sample_scene(second)
    assert a == b and caption(a, first) == caption(b, second)
    assert np.array_equal(render(a), render(b))


def test_captions_name_every_attribute_and_read_like_sentences():
    scene = Scene("circle", "red", "black", "right")
    assert caption(scene) == "a red circle moving right on a black background"
    assert caption(Scene("star", "orange", "gray", "up", "small", "fast")) == (
        "a small orange star moving up quickly on a gray background"
    )
    assert caption(Scene("square", "orange", "navy", "growing")).startswith("an orange square")
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(rng)
        text = caption(scene, rng)
        assert scene.shape in text and scene.color in text and scene.background in text
        assert "  " not in text and " ," not in text and "a orange" not in text


@pytest.mark.parametrize("held_out", [False, True])
def test_the_oracle_reads_rendered_clips_without_a_mistake(held_out):
    rng = np.random.default_rng(11)
    for _ in range(60):
        scene = sample_scene(rng, held_out)
        reading = read_clip(render(scene))
        assert all(reading.agrees(scene).values()), (scene, reading)


def test_the_oracle_reads_every_combination_that_is_held_out():
    for shape, color, background, motion in combinations(held_out=True):
        scene = Scene(shape, color, background, motion)
        assert all(read_clip(render(scene)).agrees(scene).values()), (scene, read_clip(render(scene)))


def test_the_oracle_sees_a_wrong_motion_a_wrong_colour_and_an_empty_picture():
    clip = render(Scene("star", "green", "navy", "left"))
    assert read_clip(clip[::-1]).motion == "right"
    assert read_clip(np.repeat(clip[:1], 17, axis=0)).motion is None
    assert read_clip(clip[..., ::-1]).background != "navy"
    empty = np.full((17, 64, 64, 3), 110, np.uint8)
    assert read_clip(empty).shape is None and read_clip(empty).background == "gray"
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    assert read_clip(noise).motion is None


def test_the_oracle_refuses_what_is_not_a_clip():
    with pytest.raises(ValueError, match="at least 3 frames"):
        read_clip(np.zeros((2, 64, 64, 3), np.uint8))


def test_shapes_stay_inside_the_picture_at_every_speed_and_size():
    rng = np.random.default_rng(1)
    for _ in range(500):
        scene = sample_scene(rng)
        radius, x, y, _ = tracks(scene, 17, (64, 64))
        assert (np.minimum.reduce([x, y, 64 - x, 64 - y]) > 0.4 * radius).all()
