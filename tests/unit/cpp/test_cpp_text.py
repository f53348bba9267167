"""The C++ library reads a prompt as Python does, or says that it does not: same cleaning, same token ids."""

from __future__ import annotations

import importlib
import unicodedata
from pathlib import Path

import ftfy
import ftfy.badness
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.cpp_tools import SOURCES, USAGE, twin
from tmd_engines.bundle.text import DrawsInfo
from tmd_runtime.built_in import BUILT_IN
from tmd_runtime.text.tokenizer import Tokenizer, clean_prompt
from tmd_runtime.text.vocabulary import unknown_words

FUZZ = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

PROMPTS = [
    "a red circle moving right on a black background",
    "  Spaces\tand\r\nlines\u2028of \u00a0many\u3000kinds \x1c ",
    "“curly” ‘quotes’, ﬁne ﬂow of ŉ and Ǆ, ＷＩＤＥ ﾊﾝｶｸ ｶﾞ ﾡ",
    "Tom &amp;amp; Jerry &lt;3 &notit; &NotAnEntity; &eacute &EACUTE; &SZLIG; &frac12;&#x41;&#65;",
    "tags <b>keep &eacute; as it is</b>\nalso &amp; here\n",
    "first &amp; line\nsecond <line> &amp;\nthird &amp;",
    "&#0; &#xD800; &#x110000;",
    "numbers &#x80; &#233; &#x1F3A5; &#65 &#x41 &#9; &#1; &#127; &#xFDD0; &#x1FFFE;",
    "&amp;lt; &amp;amp;amp; &#38;#38; &#59; &#x3b; &; &#; &#x; &#xg; &a &ab &abcdefghijklmnopqrstuvwxyzabcdefghij;",
    "\x1b[31mred\x1b[0m \x1b[1;\u0663m \x1b[ \x00\x07\ufeff\u206a\ufffc end",
    "cafe\u0301 Å \u1100\u1161\u11a8 \u0958 ñ n\u0303",
    "Ein grüner Käfer läuft über die Straße, čeština, Łódź, naïve œuvre",
    "Красный шар, зелёная трава",
    "Κόκκινος κύκλος",
    "一只猫在草地上奔跑，镜头缓慢推进。",
    "赤い円が右に動く・ネオン",
    "دائرة حمراء تتحرك",
    "लाल गोला",
    "빨간 원이 움직인다",
    "emoji 🎥 👩‍👩‍👧 🏴󠁧󠁢󠁷󠁬󠁳󠁿 x\u200dy",
    "50 € or £5 at 30°, ½ cup © 2024 ™",
    "¿Qué? ¡No! «ça va» – déjà-vu… 2×3² ±5µm",
    "",
    " \n\t ",
    "word " * 700,
]
MOJIBAKE = ["cafÃ©", "Ã  la mode", "â€œquotesâ€\x9d", "sÃ³ isso", "ГўВЂВњ x", "&Atilde;&copy;", "\x85 a", "Å“uvre Ã©"]

# Characters that the detector and the fixes look at, each with a fair chance beside each other.
ALPHABET = sorted(
    {c for c in map(chr, range(0x20, 0x250)) if ftfy.badness.is_bad("a" + c) or c.isprintable()}
    | set("".join(content.replace("-", "") for content in ftfy.badness.MOJIBAKE_CATEGORIES.values()))
    | set("‘’“”\u02bcﬁĲŉ＆；Ａ&;#xX0123456789<\n\r\t ")
    | set("amplteacute")
)


def in_python(text: str) -> str | None:
    """What Python cleans the text to; None if ftfy saw wrongly decoded text on the way, which C++ refuses."""
    seen = []
    real = ftfy.is_bad

    def watch(piece: str) -> bool:
        seen.append(real(piece))
        return seen[-1]

    ftfy.is_bad = watch  # type: ignore[assignment]
    try:
        cleaned = clean_prompt(text)
    finally:
        ftfy.is_bad = real
    return None if any(seen) else cleaned


def check_clean(text: str) -> None:
    expected, answer = in_python(text), twin().ask("clean", text=text)
    if expected is None:
        assert answer.get("status") == USAGE and "character set" in answer["error"], (text, answer)
    else:
        assert answer == {"ok": expected}, text


@pytest.mark.parametrize("text", PROMPTS, ids=lambda text: ascii(text)[:30])
def test_prompts_are_cleaned_alike(text: str) -> None:
    assert in_python(text) is not None
    check_clean(text)


@pytest.mark.parametrize("text", MOJIBAKE, ids=ascii)
def test_wrongly_decoded_prompts_are_refused(text: str) -> None:
    """Python repairs these; C++ must not guess, and must not pass them on either."""
    assert in_python(text) is None
    check_clean(text)


@FUZZ
@given(st.text(st.sampled_from(ALPHABET), max_size=24))
def test_fuzz_text_of_delicate_characters(text: str) -> None:
    check_clean(text)
    assert twin().ask("is_bad", text=text)["ok"] == (not text.isascii() and ftfy.is_bad(text))


@FUZZ
@given(st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=24))
def test_fuzz_any_text(text: str) -> None:
    check_clean(text)


@FUZZ
@given(st.text(st.sampled_from("&#;xX0aglmptuoénic<18 \n"), max_size=30))
def test_fuzz_html_references(text: str) -> None:
    check_clean(text)


def test_every_pair_of_delicate_characters() -> None:
    """The detector goes by neighbours: all pairs of its characters, in one order and the other."""
    classes = "".join(ftfy.badness.MOJIBAKE_CATEGORIES.values()).replace("-", "")
    letters = sorted(set(classes) | set("aZ 1.\n²€°"))
    for first in letters:
        joined = [first + second for second in letters]
        expected = [ftfy.is_bad(pair) for pair in joined]
        found = [twin().ask("is_bad", text=pair)["ok"] for pair in joined]
        wrong = [pair for pair, one, other in zip(joined, expected, found, strict=True) if one != other]
        assert not wrong or all(pair.isascii() for pair in wrong), wrong


@pytest.mark.parametrize("text", PROMPTS, ids=lambda text: ascii(text)[:30])
def test_token_ids_are_the_same(text: str) -> None:
    tokenizer = Tokenizer(BUILT_IN / "tokenizer.model", 32)
    answer = twin().ask("tokens", bundle=str(BUILT_IN), text=text, may_be_empty=True)
    expected = tokenizer(text, allow_empty=True)
    assert answer["ok"] == expected.input_ids[0].tolist()
    assert answer["mask"] == expected.attention_mask[0].tolist()
    assert answer["dropped"] == expected.dropped


@FUZZ
@given(st.text(max_size=60))
def test_fuzz_token_ids(text: str) -> None:
    if in_python(text) is None:
        return
    expected = Tokenizer(BUILT_IN / "tokenizer.model", 32)(text, allow_empty=True)
    answer = twin().ask("tokens", bundle=str(BUILT_IN), text=text, may_be_empty=True)
    assert answer["ok"] == expected.input_ids[0].tolist()


def test_an_empty_prompt_is_refused() -> None:
    assert twin().ask("tokens", bundle=str(BUILT_IN), text=" \n ")["status"] == USAGE


def test_tables_are_those_of_the_packages_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SOURCES / "tools"))
    make_onnx_schema, make_text_tables = map(importlib.import_module, ("make_onnx_schema", "make_text_tables"))
    tables = {make_text_tables.FOLDER / name: text for name, text in make_text_tables.FILES.items()}
    tables |= {make_onnx_schema.FOLDER / name: text for name, text in make_onnx_schema.FILES.items()}
    for file, text in tables.items():
        assert file.read_text() == text(), f"{file}: run the script in {Path('runtime/cpp/tools')}"


DRAWS = DrawsInfo(words=("a", "don't", "red", "star"), description="one red star", example="a red star")
NEAR_WORDS = st.text("aAzZ'_-0 \u0301\u00e9\u0130\u03a3\u661f\u0663\u200d\U0001f3a5", max_size=40)


@FUZZ
@given(text=st.one_of(NEAR_WORDS, st.text(max_size=60), st.sampled_from([*PROMPTS, "A Red STAR, don't", "x" * 50])))
def test_unknown_words_are_found_as_in_python(text: str) -> None:
    # Surrogates are refused before, and characters that Python's version of Unicode does not know may be known here.
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cs", "Cn"))
    note = twin().ask("unknown_words", text=text, **DRAWS.model_dump(mode="json"))["ok"]
    assert [note] * bool(note) == unknown_words(text, DRAWS)
