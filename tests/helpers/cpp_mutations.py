"""Damaged ONNX files from whole ones, by a seed: what a graph's fields are changed to, and how they are written.

A file is taken apart into a tree of fields as they stand on the wire, so that a change deep inside keeps all lengths
around it right. Half of the changes keep to protobuf's canonical encoding, and so reach the checks behind it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx

VARINT, FIXED64, BYTES, GROUP, END_GROUP, FIXED32 = range(6)
NUMBERS = (0, 1, 2, 3, 5, 7, 8, 16, 17, 23, 99, 127, 128, 1 << 31, (1 << 32) - 1, (1 << 32) + 1, 1 << 63, (1 << 64) - 1)
WORDS = (b"", b"x", b"Loop", b"Relu", b"Softmax", b"axis", b"ai.onnx", b"com.microsoft", b"location", b"length", b"4",
         b"-1", b"\xc3\xa9", b"\xff", b"\xed\xa0\x80", b"\0")  # fmt: skip


def varint(value: int, length: int = 0) -> bytes:
    """A number in as few bytes as it goes, or in `length`."""
    out = bytearray()
    while value > 127 or len(out) + 1 < length:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@dataclass
class Part:
    """A field on the wire. `inside` has the fields of a message, else `body` the bytes behind tag and length."""

    number: int
    wire: int
    body: bytes = b""
    inside: list[Part] | None = None
    kind: Any = None  # the descriptor of the message inside
    longer_tag: int = 0
    longer_length: int = 0

    def copy(self) -> Part:
        inside = None if self.inside is None else [part.copy() for part in self.inside]
        return Part(self.number, self.wire, self.body, inside, self.kind, self.longer_tag, self.longer_length)

    def written(self) -> bytes:
        body = self.body if self.inside is None else b"".join(part.written() for part in self.inside)
        length = varint(len(body), self.longer_length) if self.wire == BYTES else b""
        return varint(self.number << 3 | self.wire, self.longer_tag) + length + body


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def parts_of(data: bytes, kind: Any) -> list[Part]:
    """The fields of a message of the type that the descriptor `kind` has."""
    found, at = [], 0
    while at < len(data):
        tag, start = _read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == BYTES:
            size, start = _read_varint(data, start)
            at = start + size
        else:
            at = _read_varint(data, start)[1] if wire == VARINT else start + (8 if wire == FIXED64 else 4)
        inner = kind.fields_by_number[number].message_type
        body = data[start:at]
        if inner is None:
            found.append(Part(number, wire, body))
        else:
            found.append(Part(number, wire, inside=parts_of(body, inner), kind=inner))
    return found


def graph_parts(data: bytes) -> Part:
    """A whole file as the message in a field that is never written."""
    kind = onnx.ModelProto.DESCRIPTOR
    return Part(0, BYTES, inside=parts_of(data, kind), kind=kind)


@dataclass
class Place:
    """A field of the tree, and the message that it stands in."""

    parent: Part
    index: int
    siblings: list[Part] = field(init=False)
    part: Part = field(init=False)

    def __post_init__(self) -> None:
        self.siblings = self.parent.inside or []
        self.part = self.siblings[self.index]


def _places(parent: Part) -> Iterator[Place]:
    for index, part in enumerate(parent.inside or []):
        yield Place(parent, index)
        yield from _places(part)


def _number(place: Place, rng: random.Random) -> None:
    if place.part.wire == VARINT:
        place.part.body = varint(rng.choice(NUMBERS))
    else:
        _word(place, rng)


def _word(place: Place, rng: random.Random) -> None:
    place.part.wire, place.part.inside, place.part.body = BYTES, None, rng.choice(WORDS)


def _overlong(place: Place, rng: random.Random) -> None:
    part, length = place.part, rng.randrange(2, 11)
    if part.wire == VARINT and rng.random() < 0.5:
        part.body = varint(_read_varint(part.body, 0)[0], length)
    elif part.wire == BYTES and rng.random() < 0.5:
        part.longer_length = length
    else:
        part.longer_tag = length


def _split(place: Place, rng: random.Random) -> None:
    part = place.part
    twin = part.copy()
    if part.inside is not None and twin.inside is not None:
        cut = rng.randrange(len(part.inside) + 1)
        part.inside, twin.inside = part.inside[:cut], twin.inside[cut:]
    place.siblings.insert(rng.randrange(place.index + 1, len(place.siblings) + 1), twin)


def _unknown(place: Place, rng: random.Random) -> None:
    wire = rng.choice((VARINT, FIXED64, BYTES, GROUP, FIXED32))
    number = rng.choice((15, 19, 27, 31, 32, 60, 500, (1 << 29) - 1))
    body = {VARINT: b"\1", FIXED64: bytes(8), BYTES: b"abc", FIXED32: bytes(4)}
    ends = varint(number << 3 | END_GROUP)
    place.siblings.insert(rng.randrange(len(place.siblings) + 1), Part(number, wire, body.get(wire, ends)))


def _other_field(place: Place, rng: random.Random) -> None:
    place.part.number = rng.choice([*place.parent.kind.fields_by_number, rng.randrange(1, 40)])


def _new_field(place: Place, rng: random.Random) -> None:
    """A field that the schema has, where its number wants it, with some content."""
    packed = [schema for schema in place.parent.kind.fields if schema.is_packed]
    schema = rng.choice(packed if packed and rng.random() < 0.5 else place.parent.kind.fields)
    wire = {1: FIXED64, 2: FIXED32, 3: VARINT, 4: VARINT, 5: VARINT, 14: VARINT}.get(schema.type, BYTES)
    body = varint(rng.choice(NUMBERS)) if wire == VARINT else bytes({FIXED64: 8, FIXED32: 4}.get(wire, 0))
    if schema.is_packed:
        wire, body = BYTES, body * rng.randrange(3)
    elif wire == BYTES and schema.message_type is None:
        body = rng.choice(WORDS)
    at = sum(part.number <= schema.number for part in place.siblings)
    place.siblings.insert(at, Part(schema.number, wire, body))


def _repacked(place: Place, rng: random.Random) -> None:
    """Several numbers in one field, or a packed field's bytes as a single number."""
    part = place.part
    if part.wire == BYTES:
        part.inside, part.wire, part.body = None, VARINT, varint(rng.choice(NUMBERS))
    else:
        part.body, part.wire = part.body * rng.randrange(3), BYTES


def _deep(place: Place, rng: random.Random) -> None:
    """About as many sequences of sequences as protobuf reads, in a type of the graph's value_info."""
    levels, body = rng.randrange(90, 104), b""
    for level in range(levels):
        body = varint((1 if level % 2 else 4) << 3 | BYTES) + varint(len(body)) + body
    info = Part(13, BYTES, inside=[Part(2, BYTES, body)])
    model = place.parent
    if model.kind is onnx.ModelProto.DESCRIPTOR and model.inside:
        graph = next((part for part in model.inside if part.number == 7 and part.inside is not None), None)
        if graph is not None and graph.inside is not None:
            graph.inside.append(info)


def _delete(place: Place, rng: random.Random) -> None:
    del place.siblings[place.index]


def _double(place: Place, rng: random.Random) -> None:
    place.siblings.insert(place.index, place.part.copy())


def _move(place: Place, rng: random.Random) -> None:
    place.siblings.insert(rng.randrange(len(place.siblings)), place.siblings.pop(place.index))


def _wire(place: Place, rng: random.Random) -> None:
    place.part.wire = rng.randrange(8)


def _flip(place: Place, rng: random.Random) -> None:
    part = place.part
    body = bytearray(part.written() if part.inside is None else b"\0")
    body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    if part.inside is None:  # the tag may be what is hit
        place.siblings[place.index : place.index + 1] = [_Raw(0, 0, bytes(body))]


class _Raw(Part):
    """Bytes that stand for themselves."""

    def copy(self) -> Part:
        return _Raw(0, 0, self.body)

    def written(self) -> bytes:
        return self.body


_CHANGES: tuple[Callable[[Place, random.Random], None], ...] = (
    _number, _number, _number, _word, _overlong, _split, _unknown, _other_field, _new_field, _new_field, _new_field,
    _repacked, _delete, _delete, _double, _double, _move, _wire, _flip,
)  # fmt: skip


def changed(whole: Part, rng: random.Random) -> bytes:
    """The file with one change, seldom two or three."""
    tree = whole.copy()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            break
        if rng.random() < 0.03:
            _deep(Place(tree, 0), rng)
        else:
            rng.choice(_CHANGES)(rng.choice(places), rng)
    data = b"".join(part.written() for part in tree.inside or [])
    if data and rng.random() < 0.05:
        at = rng.randrange(len(data))
        data = rng.choice((data[:at], data[:at] + bytes([rng.randrange(256)]) + data[at:], data + b"\0"))
    return data
