"""The character map of a tokenizer is checked before sentencepiece's library reads it: no offset leads out of it."""

from __future__ import annotations

import importlib
import random
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tests.helpers.bundle_tools import reseal
from tests.helpers.cpp_tools import RUN, twin
from tmd_runtime.built_in import BUILT_IN
from tmd_runtime.text.charsmap import is_sound

schema: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")


@cache
def small_model(folder: Path) -> Any:
    """A tokenizer with a map of a few characters."""
    rules = {"41": "61", "C4": "61 65", "DF": "73 73", "41 42": "63", "3042": "61", "1F3A5": "66 69 6C 6D", "7": ""}
    (folder / "rules.tsv").write_text("".join(f"{key}\t{value}\n" for key, value in rules.items()))
    (folder / "text.txt").write_text("a few words of text that have some letters\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "small"),
        vocab_size=24,
        hard_vocab_limit=False,
        normalization_rule_tsv=str(folder / "rules.tsv"),
        minloglevel=2,
    )
    return schema.ModelProto.FromString((folder / "small.model").read_bytes())


def changed(charsmap: bytes, rng: random.Random) -> bytes:
    out = bytearray(charsmap)
    choice = rng.randrange(8)
    if choice == 0:
        out[:4] = rng.choice((0, 1, 4, 1024, len(out) - 4, len(out) - 5, 1 << 31)).to_bytes(4, "little")
    elif choice == 1:
        del out[rng.randrange(len(out)) :]
    elif choice == 2:
        out[-1] = rng.choice((0, 65, 255))
    else:
        used = [at for at in range(4, len(out), 4) if any(out[at : at + 4])]
        at = rng.choice(used)
        unit = int.from_bytes(out[at : at + 4], "little") ^ 1 << rng.randrange(32)
        out[at : at + 4] = unit.to_bytes(4, "little")[: len(out) - at]
    return bytes(out)


def test_changed_maps_are_refused_by_the_same_rule(tmp_path: Path) -> None:
    model, rng, seen = small_model(tmp_path), random.Random(5), Counter[bool]()
    whole = model.normalizer_spec.precompiled_charsmap
    assert 1000 < len(whole) < 10000 and is_sound(whole)
    for case in range(300):
        spec = model.denormalizer_spec if case % 3 == 0 else model.normalizer_spec
        before = spec.precompiled_charsmap
        spec.precompiled_charsmap = damaged = changed(whole, rng) if case else whole
        answer = twin().ask("charsmaps", data=model.SerializeToString().hex())["ok"]
        assert answer == is_sound(damaged), damaged.hex()
        seen[answer] += 1
        spec.precompiled_charsmap = before
    assert min(seen.values()) > 50, seen


@pytest.mark.parametrize(
    "data", [b"", b"\x1a\x02\x12", b"\x1a\x01\x08", b"\x1a\x82\x00\x12\x00", b"\x1a\x04\x12\x02ab"]
)
def test_models_that_hide_a_map_are_refused(data: bytes) -> None:
    """Cut, encoded in another way, or too short; nothing at all has no map."""
    assert twin().ask("charsmaps", data=data.hex())["ok"] == (data == b"")


def test_a_bundle_with_such_a_tokenizer_reads_no_prompt(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(BUILT_IN, bundle)
    path = bundle / "tokenizer.model"
    model = schema.ModelProto.FromString(path.read_bytes())
    charsmap = bytearray(model.normalizer_spec.precompiled_charsmap)
    assert is_sound(bytes(charsmap))
    charsmap[4:8] = (0x7FFFFC00).to_bytes(4, "little")  # the root's children: gigabytes away
    model.normalizer_spec.precompiled_charsmap = bytes(charsmap)
    path.write_bytes(model.SerializeToString())
    reseal(bundle)
    answer = twin().ask("tokens", bundle=str(bundle), text="a red circle")
    assert answer.get("status") == RUN and "no readable sentencepiece model" in answer["error"], answer
