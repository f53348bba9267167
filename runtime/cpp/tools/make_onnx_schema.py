"""Writes what the checks of graphs know of ONNX, into `src/bundle` (run by hand).

`onnx_schema.inc` has every field of ONNX's messages, from the `onnx` package: graphs are read without protobuf
(src/bundle/protobuf_wire.hpp says why). `operators.inc` has the operators, attributes and weights that a graph of a
bundle may have and the limits of a graph, from `tmd_engines.bundle`. A test compares both files with their sources.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from tmd_engines.bundle import graph_file, operators

FOLDER = Path(__file__).parents[1] / "src" / "bundle"
_HEADING = "// Written by tools/make_onnx_schema.py from {}; do not edit."

# A type that is not here is an error: the check must know how protobuf writes it.
_KINDS = {
    FieldDescriptor.TYPE_DOUBLE: "kFixed64",
    FieldDescriptor.TYPE_FLOAT: "kFixed32",
    FieldDescriptor.TYPE_INT32: "kInt32",
    FieldDescriptor.TYPE_INT64: "kInt64",
    FieldDescriptor.TYPE_UINT64: "kInt64",
    FieldDescriptor.TYPE_ENUM: "kEnum",
    FieldDescriptor.TYPE_STRING: "kText",
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
    """The enumeration of messages, then one line per field, ordered by message and number."""
    names = {message: message.full_name.removeprefix("onnx.").replace(".", "_") for message in messages()}
    lines = [_HEADING.format("the onnx package"), "enum Message {"]
    lines += [f"  {name}," for name in names.values()]
    lines += ["  kNoMessage", "};", "", "constexpr FieldRule kFieldRules[] = {"]
    for message, name in names.items():
        for field in sorted(message.fields, key=lambda field: field.number):
            inner = names[field.message_type] if field.message_type is not None else "kNoMessage"
            count = "kPacked" if field.is_packed else "kRepeated" if field.is_repeated else "kOnce"
            # Of a oneof only the last member would be kept, and an enum's other values are unknown fields.
            choice = message.oneofs.index(field.containing_oneof) + 1 if field.containing_oneof else 0
            values = sum(1 << value.number for value in field.enum_type.values) if field.enum_type else 0
            rule = f"{name}, {field.number}, {_KINDS[field.type]}, {inner}, {count}, {choice}, {values:#x}"
            lines.append(f"    {{{rule}}},  // {field.name}")
    return "\n".join([*lines, "};", ""])


def operators_text() -> str:
    """Limits, then the tables of operators.py."""
    limits = {
        "std::uint64_t kMaxGraphBytes": graph_file.MAX_GRAPH_BYTES,
        "std::size_t kMaxNodes": graph_file.MAX_NODES,
        "std::size_t kMaxWeights": graph_file.MAX_WEIGHTS,
    }
    names = sorted(operators.OPERATORS)
    pairs = [(name, attribute) for name in names for attribute in sorted(operators.OPERATORS[name])]
    lines = [_HEADING.format("tmd_engines.bundle")]
    lines += [f"inline constexpr {name} = {value};" for name, value in limits.items()]
    for heading, rows in (
        ("std::string_view kOperators[]", [f'"{name}"' for name in names]),
        ("OperatorAttribute kOperatorAttributes[]", [f'{{"{name}", "{attribute}"}}' for name, attribute in pairs]),
        ("std::int64_t kAttributeTypes[]", [str(number) for number in sorted(operators._TYPES)]),
        ("TensorType kTensorTypes[]", [f"{{{number}, {size}}}" for number, size in operators.TENSOR_BITS.items()]),
    ):
        lines += ["", f"inline constexpr {heading} = {{", *[f"    {row}," for row in rows], "};"]
    return "\n".join([*lines, ""])


FILES = {"onnx_schema.inc": schema_text, "operators.inc": operators_text}

if __name__ == "__main__":
    for name, text in FILES.items():
        (FOLDER / name).write_text(text(), encoding="ascii")
        print(f"wrote {FOLDER / name}")
