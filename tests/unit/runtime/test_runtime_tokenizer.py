"""Prompts become the ids that the text encoder was trained on, and no prompt ends in a traceback."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tmd_runtime
from tests.helpers.synthetic import SENTENCES, TEXT_LENGTH, tokenizer_bytes
from tmd_engines import BundleError
from tmd_runtime import RuntimeFailure, UsageFailure
from tmd_runtime.text.tokenizer import Tokenizer, clean_prompt


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer-é") / "tokenizer.model"
    file.write_bytes(tokenizer_bytes())
    return Tokenizer(file, TEXT_LENGTH)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a  red\n\tcircle ", "a red circle"),
        ("a &amp;amp; b", "a & b"),
        ("schÃ¶n", "schön"),
        ("A RED, circle!", "A RED, circle!"),
        ("\ud800", "?"),
        ("　一只 猫　", "一只 猫"),
        ("", ""),
    ],
)
def test_cleaning(text: str, clean: str) -> None:
    assert clean_prompt(text) == clean


def test_framing(tokenizer: Tokenizer) -> None:
    tokens = tokenizer("a red circle")
    length = int(tokens.attention_mask.sum())
    assert tokens.input_ids.shape == tokens.attention_mask.shape == (1, TEXT_LENGTH)
    assert tokens.input_ids.dtype == tokens.attention_mask.dtype == np.int64
    assert tokens.input_ids[0, length - 1] == 1, "the end mark"
    assert (tokens.input_ids[0, length:] == 0).all() and (tokens.attention_mask[0, :length] == 1).all()
    assert tokens.dropped == 0 and tokens.warning is None


def test_ids_are_the_references(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reference = pytest.importorskip("tmd_ref.text", exc_type=ImportError)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    expected_ids, expected_mask = reference.Tokenizer(tmp_path / "tokenizer.model", TEXT_LENGTH)(SENTENCES)
    for sentence, ids, mask in zip(SENTENCES, expected_ids, expected_mask, strict=True):
        tokens = tokenizer(sentence)
        assert np.array_equal(tokens.input_ids[0], ids) and np.array_equal(tokens.attention_mask[0], mask)


def test_a_long_prompt_is_cut_and_says_so(tokenizer: Tokenizer) -> None:
    short, long = tokenizer("a red circle " * 3), tokenizer("a red circle " * 100)
    assert short.warning is None
    assert long.input_ids[0, -1] == 1 and long.attention_mask.all()
    assert long.dropped > 0 and long.warning is not None and str(long.dropped) in long.warning
    start = int(short.attention_mask.sum()) - 1
    assert np.array_equal(long.input_ids[0, :start], short.input_ids[0, :start])


def test_a_prompt_that_just_fits_is_not_cut(tokenizer: Tokenizer) -> None:
    words = next(n for n in range(1, 99) if tokenizer("a " * n).attention_mask.all())
    assert tokenizer("a " * words).dropped == 0
    assert tokenizer("a " * (words + 1)).dropped > 0


@pytest.mark.parametrize("prompt", ["", "   ", "\n", "&nbsp;", "\0"])
def test_an_empty_prompt_is_refused(tokenizer: Tokenizer, prompt: str) -> None:
    with pytest.raises(UsageFailure, match="prompt is empty"):
        tokenizer(prompt)


@given(st.text(st.characters(), max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_gives_tokens_or_one_clear_error(tokenizer: Tokenizer, prompt: str) -> None:
    try:
        tokens = tokenizer(prompt)
    except UsageFailure:
        return
    assert tokens.input_ids.min() >= 0 and tokens.attention_mask.sum() >= 2


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "tokenizer.model"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RuntimeFailure, match=r"tokenizer\.model is no readable sentencepiece model"):
        Tokenizer(file, TEXT_LENGTH)


@pytest.mark.parametrize("becomes", ["another", "pipe", "nothing"])
def test_a_file_that_was_exchanged_after_the_check_is_refused(synthetic_bundle: Path, becomes: str) -> None:
    with tmd_runtime.load(synthetic_bundle, engine="onnxruntime") as pipeline:
        file = synthetic_bundle / "tokenizer.model"
        content = bytearray(file.read_bytes())
        file.unlink()
        if becomes == "pipe":
            os.mkfifo(file)
        elif becomes == "another":
            content[-1] ^= 1
            file.write_bytes(content)
        with pytest.raises(BundleError, match=r"tokenizer\.model (is|has)"):
            pipeline(SENTENCES[0], frames=1, size=(32, 32))
