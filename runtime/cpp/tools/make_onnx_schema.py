"""Writes `src/bundle/onnx_schema.inc`: every field of ONNX's messages, as the graph check needs it (run by hand).

The check reads graphs without protobuf (src/bundle/protobuf_wire.hpp says why), so it must know which fields are
messages and how scalars are coded. A test compares the file with the `onnx` package in use.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.descriptor import Descriptor, FieldDescriptor

FILE = Path(__file__).parents[1] / "src" / "bundle" / "onnx_schema.inc"

_KINDS = {
    FieldDescriptor.TYPE_DOUBLE: "kFixed64",
    FieldDescriptor.TYPE_FIXED64: "kFixed64",
    FieldDescriptor.TYPE_SFIXED64: "kFixed64",
    FieldDescriptor.TYPE_FLOAT: "kFixed32",
    FieldDescriptor.TYPE_FIXED32: "kFixed32",
    FieldDescriptor.TYPE_SFIXED32: "kFixed32",
    FieldDescriptor.TYPE_STRING: "kBytes",
    FieldDescriptor.TYPE_BYTES: "kBytes",
    FieldDescriptor.TYPE_MESSAGE: "kMessage",
}


def messages() -> list[Descriptor]:
    """All messages that a ModelProto can hold, itself first."""
    found, waiting = [], [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        current = waiting.pop(0)
        if current not in found:
            found.append(current)
            waiting += [field.message_type for field in current.fields if field.message_type is not None]
    return found


def schema_text() -> str:
    """The content of the file: the enumeration of messages, then one line per field."""
    names = {message: message.full_name.removeprefix("onnx.").replace(".", "_") for message in messages()}
    lines = ["// Written by tools/make_onnx_schema.py from the onnx package; do not edit.", "enum Message {"]
    lines += [f"  {name}," for name in names.values()]
    lines += ["  kNoMessage", "};", "", "constexpr FieldRule kFieldRules[] = {"]
    for message, name in names.items():
        for field in sorted(message.fields, key=lambda field: field.number):
            kind = _KINDS.get(field.type, "kVarint")
            inner = names[field.message_type] if field.message_type is not None else "kNoMessage"
            repeated = "true" if field.is_repeated else "false"
            lines.append(f"    {{{name}, {field.number}, {kind}, {inner}, {repeated}}},  // {field.name}")
    return "\n".join([*lines, "};", ""])


if __name__ == "__main__":
    FILE.write_text(schema_text(), encoding="ascii")
    print(f"wrote {FILE}")
