"""The character map of a sentencepiece model, checked before the library reads it.

Versions of sentencepiece before 0.2.3 follow offsets of the map that lead out of it. The layout is that of Darts-clone:
4 bytes with the size of the trie, the trie's units of 4 bytes, and texts that each end with a zero byte.
`runtime/cpp/src/text/charsmap.cpp` is the same rule.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from tmd_engines.cache_folder import Facts, code_key

_FACTS = Facts("tokenizers.json")


def is_sound(charsmap: bytes) -> bool:
    """Whether no unit of the trie points out of the trie or of the texts. An empty map is none, and sound."""
    if not charsmap:
        return True
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or size == 0 or size % 4 or size >= len(charsmap) - 4:
        return False
    units, texts = np.frombuffer(charsmap[4 : 4 + size], "<u4").astype(np.int64), charsmap[4 + size :]
    try:
        texts.decode()
    except UnicodeDecodeError:
        return False
    inner = units >> 31 == 0
    children = np.arange(len(units)) ^ ((units >> 10) << ((units & 1 << 9) >> 6))
    # The next character, any byte, chooses one of 256 units.
    if texts[-1] != 0 or not inner[0] or bool(np.any((children[inner] | 255) >= len(units))):
        return False
    ends = children[inner & (units >> 8 & 1 == 1)]
    return not bool(np.any(units[ends] & 0x7FFFFFFF >= len(texts)))


def has_sound_charsmaps(model: bytes) -> bool:
    """Whether the maps of a serialised sentencepiece model are sound. False too for what is no such model.

    A yes is kept between runs: importing protobuf and its schema takes longer than loading a small model.
    """
    code = code_key(Path(__file__))
    key = None if code is None else f"charsmaps {hashlib.sha256(code.encode() + model).hexdigest()}"
    if key is not None and _FACTS.read().get(key) is True:
        return True
    sound = _has_sound_charsmaps(model)
    if sound and key is not None:
        _FACTS.add({key: True})
    return sound


def _has_sound_charsmaps(model: bytes) -> bool:
    from importlib import import_module

    from google.protobuf.message import DecodeError

    from tmd_engines.device.numbers import decimal_point

    with decimal_point():  # protobuf reads the schema's own numbers in the locale of the host
        schema = import_module("sentencepiece.sentencepiece_model_pb2")
    parsed = schema.ModelProto()
    try:
        parsed.ParseFromString(model)
    except DecodeError:
        return False
    specs = (parsed.normalizer_spec, parsed.denormalizer_spec)
    return all(is_sound(spec.precompiled_charsmap) for spec in specs)
