"""A prompt with words that a model does not know gets a note; other prompts, and other models, get none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tmd_runtime
from tmd_engines import Bundle
from tmd_engines.bundle.text import DrawsInfo
from tmd_export.export import _draws
from tmd_ref.captions import caption, typed_caption, vocabulary
from tmd_ref.scenes import sample_scene
from tmd_runtime.built_in import BUNDLES
from tmd_runtime.text.vocabulary import unknown_words

DRAWS = DrawsInfo(words=("a", "don't", "red", "star"), description="one red star", example="a red star")
ENDING = 'it draws one red star. Example: "a red star".'


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a red star", None),
        ("A RED, star! (Don't)", None),
        ("", None),
        ("...", None),
        ("a cat on a skateboard", '"cat", "on", "skateboard"'),
        ("A Cat, a CAT and cats", '"cat", "and", "cats"'),
        ("red-star rock'n'roll 'star'", "\"rock'n'roll\""),
        ("звезда 星 étoile 2", '"звезда", "星", "étoile", "2"'),
        ("b c d e f g h", '"b", "c", "d", "e", "f" and 2 more words'),
        ("x" * 50, f'"{"x" * 40}..."'),
        ("a \x1b[31m red \ud800 star", '"31m"'),
    ],
)
def test_words_that_the_model_does_not_know_are_named(prompt: str, named: str | None) -> None:
    expected = [] if named is None else [f"this model does not know {named}: {ENDING}"]
    assert unknown_words(prompt, DRAWS) == expected


def test_a_model_that_does_not_say_which_words_it_knows_gets_no_note() -> None:
    assert unknown_words("a cat", None) == []


def test_every_caption_of_the_training_is_known() -> None:
    rng = np.random.default_rng(0)
    ways = (caption, typed_caption)
    captions = [ways[k % 2](sample_scene(rng, held_out=bool(k % 3)), rng) for k in range(6_000)]
    draws = DrawsInfo(**{**_draws(still=False), "words": tuple(vocabulary())})
    assert not [text for text in captions if unknown_words(text, draws)]
    said = {word for text in captions for word in text.replace(",", "").replace(".", "").split()}
    assert said == set(vocabulary()), "and no other"
    assert not unknown_words(draws.example, draws)


@pytest.mark.parametrize(("name", "still"), [("tiny", False), ("tim-tiny", True)])
def test_the_built_in_models_say_what_they_were_trained_on(name: str, still: bool) -> None:
    draws = Bundle.open(BUNDLES / name).manifest.draws
    assert draws is not None and draws.model_dump(mode="json") == _draws(still)
    assert not unknown_words(draws.example, draws)
    assert ("moving" in draws.description + draws.example) is not still, "a still does not move"


def test_the_note_is_in_the_result_once_and_on_the_screen(tmp_path: Path) -> None:
    with tmd_runtime.load(threads=1) as pipeline:
        warnings = pipeline("a cat on a skateboard", seed=1, frames=1, guidance=1.0).warnings
        assert len([text for text in warnings if text.startswith('this model does not know "cat", "skateboard":')]) == 1
        embeds = pipeline.encode("a cat")
        assert not any("know" in text for text in pipeline(prompt_embeds=embeds, seed=1, frames=1).warnings)
    command = [sys.executable, "-m", "tmd_runtime", "--prompt", "a cat", "--frames", "1", "--out", "a.png", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert any('know "cat"' in text for text in json.loads(done.stdout)["warnings"])
    assert done.stderr.count('note: this model does not know "cat": it draws one circle') == 1
