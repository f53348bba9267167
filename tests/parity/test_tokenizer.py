"""tmd_ref's prompt cleaning and tokenizer against diffusers' and transformers', on a small model trained here."""

import numpy as np
import pytest

from tmd_ref.text import Tokenizer, clean_prompt
from tmd_runtime.text import tokenizer as runtime

sentencepiece = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")

MAX_LENGTH = 24

CORPUS = """a red circle moving right on a black background
two cats and a dog are boxing on a spotlighted stage, in slow motion
the camera pans over a snowy mountain village at dawn
Ein kleiner Hund läuft über die grüne Wiese, während es regnet
une étoile jaune tourne lentement sur un fond bleu marine
小猫在草地上奔跑，阳光明媚
色调艳丽，过曝，静态，细节模糊不清
猫が庭で走っている
красный круг движется вправо
قطة حمراء تجري في الحديقة
빨간 원이 오른쪽으로 움직인다
it's 3.5 metres tall (really?) & costs $12 - "quoted" <tag> 100%"""

PROMPTS = [
    "a red circle moving right",
    "",
    " \t\n ",
    "  a   red\tcircle \r\n moving\u00a0right\u3000now\u2003 ",
    "one\u2028two\u2029three\u0085four\u200bfive\ufeffsix",
    "fish &amp; chips &lt;b&gt; &amp;amp; &quot;cake&quot; &#39;x&#39; &nbsp; end",
    "&amp;lt;three levels&amp;gt; &#28;&#x1f;",
    "a <tag> keeps ftfy away from &amp;lt;entities&amp;gt;",
    "小猫在草地上奔跑，阳光明媚。",
    "ＦＵＬＬ　ＷＩＤＴＨ ｔｅｘｔ ﬁne ½ ① ㎏",
    "猫が庭で走っている Cat",
    "красный круг движется вправо",
    "قطة حمراء تجري",
    "빨간 원이 오른쪽으로",
    "e\u0301toile \u00e9toile na\u00efve",
    "emoji 🚀🐱‍👤 and 𝒎𝒂𝒕𝒉",
    "schÃ¶n and donâ€™t \u201cquotes\u201d",
    "Mixed CASE, punctuation... (kept)!",
    "▁ literal ▁▁ marks",
    "a very long prompt " * 30,
]


def shuffled_lines():
    """The corpus' words in random order: enough variety for a vocabulary of whole words and parts of words."""
    words = CORPUS.split()
    rng = np.random.default_rng(0)
    return [*CORPUS.splitlines() * 20, *(" ".join(rng.choice(words, 8)) for _ in range(500))]


@pytest.fixture(scope="module", params=[False, True], ids=["", "byte fallback"])
def model_file(request, tmp_path_factory):
    """A model like UMT5's. Whether that one has the 256 bytes as pieces must make no difference to the ids."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    fallback = {"vocab_size": 440, "character_coverage": 0.98} if request.param else {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(shuffled_lines()),
        model_prefix=str(folder / "spiece"),
        model_type="unigram",
        byte_fallback=request.param,
        **{"vocab_size": 210, "character_coverage": 1.0, **fallback},
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder / "spiece.model"


@pytest.fixture(scope="module")
def reference(model_file):
    """transformers' tokenizer, built from the same file: pieces, scores and normalisation table."""
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(model_file.read_bytes())
    return transformers.T5Tokenizer(
        vocab=[(piece.piece, piece.score) for piece in proto.pieces],
        _spm_precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap,
        extra_ids=0,
    )


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_equal_transformers(model_file, reference, prompt):
    input_ids, attention_mask = Tokenizer(model_file, MAX_LENGTH)([prompt])
    expected = reference(
        [clean_prompt(prompt)], padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="np"
    )
    assert input_ids.tolist() == expected.input_ids.tolist()
    assert attention_mask.tolist() == expected.attention_mask.tolist()
    if clean_prompt(prompt):
        assert runtime.Tokenizer(model_file, MAX_LENGTH)(prompt).input_ids.tolist() == expected.input_ids.tolist()


def test_the_prompts_reach_the_fallback(model_file):
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    bytes_in = [any(model.is_byte(token) for token in model.encode(clean_prompt(prompt))) for prompt in PROMPTS]
    assert sum(bytes_in) > (8 if model.is_byte(3) else -1)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_cleaning_equals_diffusers(prompt):
    pytest.importorskip("ftfy")
    prompt_clean = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan").prompt_clean
    assert clean_prompt(prompt) == prompt_clean(prompt)


def test_a_batch_is_framed_row_by_row(model_file):
    tokenizer = Tokenizer(model_file, MAX_LENGTH)
    prompts = ["a red circle", "long " * 100, ""]
    input_ids, attention_mask = tokenizer(prompts)
    assert input_ids.dtype == attention_mask.dtype == np.int64
    assert input_ids.shape == attention_mask.shape == (3, MAX_LENGTH)
    for ids, mask in zip(input_ids, attention_mask, strict=True):
        end = mask.sum()
        assert ids[end - 1] == 1
        assert 1 not in ids[: end - 1]
        assert not ids[end:].any()
    assert attention_mask.sum(1)[1:].tolist() == [MAX_LENGTH, 1]


def test_a_missing_file_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"spiece\.model"):
        Tokenizer(tmp_path / "absent.model", MAX_LENGTH)


def test_another_models_special_ids_are_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(shuffled_lines()), model_prefix=str(tmp_path / "other"), vocab_size=210,
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="another model"):
        Tokenizer(tmp_path / "other.model", MAX_LENGTH)
