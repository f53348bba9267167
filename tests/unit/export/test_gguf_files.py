"""Headers of GGUF files: what the library writes is read alike, and what no file can say is refused at once."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.helpers.checkpoint_files import refusal
from tmd_export import ExportError
from tmd_export.checkpoints import open_tensors
from tmd_export.checkpoints.gguf_header import read_header

U32, U64, STRING, ARRAY = 4, 10, 8, 9
F32, Q8_0 = 0, 8


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, sides: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)


def written(
    path: Path, *infos: bytes, pairs: tuple[bytes, ...] = (), data: int = 256, version: int = 3,
    counts: tuple[int, int] | None = None,
) -> Path:  # fmt: skip
    """A file put together by hand, with `data` bytes behind its header."""
    tensors, values = counts or (len(infos), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, values) + b"".join(pairs) + b"".join(infos)
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(data))
    return path


def test_what_the_library_writes_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    generator = np.random.default_rng(0)
    plain: dict[str, Any] = {
        "f32": generator.normal(size=(3, 5)).astype(np.float32),
        "f16": generator.normal(size=(7,)).astype(np.float16),
        "f64": generator.normal(size=(2, 2)),
        "i8": generator.integers(-9, 9, (2, 3, 4), dtype=np.int8),
        "i32": generator.integers(-9, 9, (4,), dtype=np.int32),
        "patches": generator.normal(size=(2, 3, 1, 2, 2)).astype(np.float32),
    }
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_custom_alignment(64)
    writer.add_array("tokenizer.ggml.tokens", [f"word {k}" for k in range(1000)])
    writer.add_array("tokenizer.ggml.scores", [0.5 * k for k in range(1000)])
    writer.add_array("comfy.gguf.orig_shape.turned", [4, 8, 2, 4])
    writer.add_bool("a.bool", True)
    writer.add_float64("a.float", 0.25)
    for name, values in plain.items():
        writer.add_tensor(name, values)
    rows = generator.normal(size=(1, 256)).astype(np.float32)
    number = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("turned", gguf.quants.quantize(rows, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = open_tensors([path])
    for name, values in plain.items():
        assert tensors.entries[name].shape == values.shape
        assert np.array_equal(tensors.read(name).numpy(), values)
    turned = tensors.read("turned")
    assert turned.shape == (4, 8, 2, 4) and (turned.flatten() - torch.from_numpy(rows[0])).abs().max() < 0.05
    assert tensors.metadata == {"general.architecture": "wan"}
    metadata = read_header(path).metadata
    assert (metadata["a.bool"], metadata["a.float"], metadata["general.alignment"]) == (True, 0.25, 64)
    theirs = gguf.GGUFReader(path)
    assert [tensor.name for tensor in theirs.tensors] == list(tensors.entries)
    assert [tensor.data_offset for tensor in theirs.tensors] == [one.first for one in read_header(path).infos]


def test_an_original_shape_in_64_bits_is_read(tmp_path: Path) -> None:
    shape = struct.pack("<IQ2q", 11, 2, 2, 4)
    pairs = (pair("comfy.gguf.orig_shape.a", ARRAY, shape),)
    tensors = open_tensors([written(tmp_path / "a.gguf", info("a", (8,), F32, 0), pairs=pairs)])
    assert tensors.entries["a"].shape == (2, 4)


HUGE = 2**63


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: written(p, info("a", (HUGE, 2), F32, 0)), "'a' has the sides [9223372036854775808, 2]"),
        (lambda p: written(p, info("a", (0, HUGE), F32, 0)), "'a' has the sides [0, 9223372036854775808]"),
        (lambda p: written(p, info("a", (2**32, 2**32), F32, 0)), "'a' has the sides"),
        (lambda p: written(p, info("a", (2**40,), F32, 0)), "'a' does not lie inside of it"),
        (lambda p: written(p, info("a", (65,), F32, 0)), "'a' does not lie inside of it"),
        (lambda p: written(p, info("a", (4,), F32, 2**64 - 32)), "'a' does not lie inside of it"),
        (lambda p: written(p, info("a", (4,), F32, 256)), "'a' does not lie inside of it"),
        (lambda p: written(p, info("a", (4,), F32, 4)), "begins between two multiples of 32 bytes"),
        (lambda p: written(p, info("a", (33,), Q8_0, 0)), "no whole blocks of 32 values, as Q8_0 has them"),
        (lambda p: written(p, info("a", (), Q8_0, 0)), "no whole blocks of 32 values"),
        (lambda p: written(p, info("a", (16,), F32, 0), info("b", (4,), F32, 32)), "'a' and 'b' lie in the same place"),
        (lambda p: written(p, info("a", (4,), F32, 0), info("a", (4,), F32, 32)), "two of its tensors have the same"),
        (lambda p: written(p, info("a", (1,) * 9, F32, 0)), "a tensor has 9 dimensions"),
        (lambda p: written(p, info("a" * 70_000, (1,), F32, 0)), "a tensor's name is too long"),
        (lambda p: written(p, counts=(2**40, 0)), "it promises 1099511627776 tensors"),
        (lambda p: written(p, counts=(0, 2**40)), "1099511627776 values of metadata"),
        (lambda p: written(p, counts=(50, 0), data=0), "its header goes on beyond byte"),
        (lambda p: written(p, pairs=(pair("k", STRING, struct.pack("<Q", HUGE)),)), "goes on beyond byte"),
        (lambda p: written(p, pairs=(pair("k", ARRAY, struct.pack("<IQ", U32, HUGE)),)), "goes on beyond byte"),
        (lambda p: written(p, pairs=(pair("k", ARRAY, struct.pack("<IQ", STRING, HUGE)),)), "goes on beyond byte"),
        (lambda p: written(p, pairs=(pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 9),)), "arrays in arrays"),
        (lambda p: written(p, pairs=(pair("k", 99, b""),)), "of type 99"),
        (lambda p: written(p, pairs=(pair("k", ARRAY, struct.pack("<IQ", 99, 3)),)), "of type 99"),
        (lambda p: written(p, pairs=(pair("general.alignment", U32, struct.pack("<I", 0)),)), "its alignment is 0"),
        (lambda p: written(p, pairs=(pair("general.alignment", U32, struct.pack("<I", 48)),)), "its alignment is 48"),
        (lambda p: written(p, pairs=(pair("general.alignment", STRING, text("x")),)), "its alignment is x"),
        (lambda p: written(p, info("a", (8,), F32, 0),
                           pairs=(pair("comfy.gguf.orig_shape.a", ARRAY, struct.pack("<IQ2i", 5, 2, 3, 4)),)),
         "'a' of [8] was"),
        (lambda p: written(p, info("a", (8,), F32, 0),
                           pairs=(pair("comfy.gguf.orig_shape.a", ARRAY, struct.pack("<IQ2i", 5, 2, -2, -4)),)),
         "'a' of [8] was"),
        (lambda p: written(p, info("a", (8,), F32, 0), pairs=(pair("comfy.gguf.orig_shape.a", U64, bytes(8)),)),
         "'a' of [8] was"),
        (lambda p: written(p, version=1), "of version 1, and versions 2 and 3 are read here"),
        (lambda p: written(p, version=3 << 24), "another byte order"),
        (lambda p: (p.write_bytes(b""), p)[1], "it is empty"),
        (lambda p: (p.write_bytes(b"GG"), p)[1], "its header goes on beyond byte 2"),
        (lambda p: (p.write_bytes(b"GGML" + bytes(64)), p)[1], "it does not begin with GGUF"),
    ],
)  # fmt: skip
def test_what_no_file_can_say_is_refused_at_once(make, said: str, tmp_path: Path) -> None:
    path, start = make(tmp_path / "model.gguf"), time.process_time()
    found = refusal(lambda: open_tensors([path]))
    assert said in found and f"{path} is not a complete GGUF file" in found
    assert time.process_time() - start < 5


@pytest.mark.parametrize(("kind", "name"), [(9, "Q8_1"), (16, "IQ2_XXS"), (39, "MXFP4"), (4, "number 4"), (999, "999")])
def test_a_type_that_is_not_read_names_itself(kind: int, name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", info("blocks.0.ffn.0.weight", (256,), kind, 0))
    said = refusal(lambda: open_tensors([path]))
    assert "stores 'blocks.0.ffn.0.weight' as" in said and name in said and "Q4_K" in said


def test_no_damage_leads_to_anything_but_a_sentence(tmp_path: Path) -> None:
    """Bytes of a header replaced and its end cut off, at random: it is read, or it is refused."""
    pairs = (
        pair("general.architecture", STRING, text("wan")),
        pair("words", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("b")),
        pair("general.alignment", U32, struct.pack("<I", 32)),
    )
    whole = written(
        tmp_path / "a.gguf", info("a", (8, 2), F32, 0), info("b", (32,), Q8_0, 64), pairs=pairs
    ).read_bytes()
    chance, refused = random.Random(0), 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data) - 256)] = chance.choice((0, 1, 8, 9, 127, 128, 255))
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        (tmp_path / "b.gguf").write_bytes(data)
        try:
            tensors = open_tensors([tmp_path / "b.gguf"])
            for name in tensors.entries:
                tensors.read(name)
        except ExportError as error:
            assert str(error).isprintable()
            refused += 1
    assert 200 < refused < 600


def test_without_the_library_the_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = written(tmp_path / "a.gguf", info("a", (8,), F32, 0))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "the package gguf, which is not installed: pip install '.[export]'" in refusal(lambda: open_tensors([path]))
