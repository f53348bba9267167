// The reader of protobuf's wire format and the check of graphs, on bytes written by hand. What the format's own library
// says of damaged graphs is compared in tests/unit/cpp/test_cpp_verdicts.py.
#include <doctest/doctest.h>

#include "base/error.hpp"
#include "bundle/graph_file.hpp"
#include "bundle/protobuf_wire.hpp"

using namespace tmd::internal;

namespace {

std::string varint(std::uint64_t value) {
  std::string out;
  for (; value > 127; value >>= 7) out += static_cast<char>((value & 127) | 128);
  return out + static_cast<char>(value);
}

std::string bytes(unsigned number, const std::string& content) {
  return varint(number << 3 | 2) + varint(content.size()) + content;
}

std::string number(unsigned field, std::uint64_t value) { return varint(field << 3) + varint(value); }

std::string value_info(const std::string& name) { return bytes(1, name) + bytes(2, bytes(1, number(1, 1))); }

std::string tensor(const std::string& location, const std::string& offset = "0") {
  const auto entry = [](const std::string& key, const std::string& value) {
    return bytes(13, bytes(1, key) + bytes(2, value));
  };
  return number(1, 0) + number(2, 1) + bytes(8, "w") + entry("location", location) + entry("offset", offset) +
         number(14, 1);
}

std::string graph(const std::string& extra) {
  return in_field_order(bytes(11, value_info("x")) + bytes(12, value_info("y")) + extra);
}

std::string model(const std::string& graph_extra, const std::string& model_extra = "") {
  return in_field_order(number(1, 10) + bytes(7, graph(graph_extra)) + bytes(8, number(2, 23)) + model_extra);
}

// A node in the graph; `attribute` gives it one of these bytes.
std::string node(const std::string& op_type, const std::string& attribute = "") {
  return bytes(1, bytes(4, op_type) + (attribute.empty() ? "" : bytes(5, attribute)));
}

std::string weight(const std::string& shape, std::uint64_t type, std::size_t size) {
  return bytes(5, shape + number(2, type) + bytes(8, "w") + bytes(9, std::string(size, '\0')));
}

GraphInfo info() {
  GraphInfo out;
  out.file = "g.onnx";
  out.data = "g.onnx.data";
  out.opset = 23;
  out.inputs = {{"x", DType::f32, {}}};
  out.outputs = {{"y", DType::f32, {}}};
  return out;
}

std::string refusal(const std::string& data) {
  try {
    check_graph(data, info(), 100, "g.onnx");
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool says(const std::string& data, const char* words) { return refusal(data).find(words) != std::string::npos; }

}  // namespace

TEST_CASE("a graph that keeps to its file is accepted") {
  CHECK(refusal(model("")) == "");
  CHECK(refusal(model(bytes(5, tensor("g.onnx.data", "99")))) == "");
}

TEST_CASE("tensors that reach outside are found wherever the format allows one") {
  const std::string bad = tensor("/etc/passwd");
  for (const std::string& place :
       {bytes(5, bad),                                       // initializer
        bytes(15, bytes(1, bad)), bytes(15, bytes(2, bad)),  // sparse initializer: values, indices
        bytes(1, bytes(5, bytes(5, bad))),                   // node, attribute: t
        bytes(1, bytes(5, bytes(10, bad))),                  // tensors
        bytes(1, bytes(5, bytes(6, bytes(5, bad)))),         // g
        bytes(1, bytes(5, bytes(11, bytes(5, bad)))),        // graphs
        bytes(1, bytes(5, bytes(22, bytes(1, bad))))})       // sparse_tensor
    CHECK(says(model(place), "only 'g.onnx.data' is allowed"));
  CHECK(says(model("", bytes(20, bytes(1, bytes(5, bad)))), "only 'g.onnx.data' is allowed"));  // training
  CHECK(says(model("", bytes(25, bytes(1, "f"))), "functions"));
  CHECK(says(model(bytes(5, tensor("g.onnx.data", "101"))), "ends at byte 101"));
  CHECK(says(model(bytes(5, tensor("g.onnx.data", "-1"))), "not a byte count"));
}

TEST_CASE("what protobuf would put together is not checked apart") {
  // One tensor given in two halves: each alone is harmless.
  const std::string halves =
      bytes(1, bytes(5, bytes(5, bytes(8, "w") + number(14, 1)) + bytes(5, tensor("g.onnx.data"))));
  CHECK(says(model(halves), "not an ONNX file"));
  CHECK(says(model("") + bytes(7, bytes(5, tensor("/etc/passwd"))), "not an ONNX file"));
}

TEST_CASE("damaged wire format is refused") {
  const std::string good = model(bytes(5, tensor("g.onnx.data")));
  for (std::size_t cut = 1; cut < good.size(); ++cut) CHECK(refusal(good.substr(0, cut)) != "");
  CHECK(says("\x0a\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x7F", "not an ONNX file"));
  CHECK(says(std::string(1, '\0'), "not an ONNX file"));  // field number 0
}

TEST_CASE("only the canonical encoding is read") {
  const auto refused = [](const std::string& data) { return says(data, "not an ONNX file"); };
  const std::string opset = bytes(8, number(2, 23)), rest = bytes(7, graph("")) + opset;
  CHECK(refusal(number(1, 10) + rest) == "");
  CHECK(refused(number(1, 10) + opset + bytes(7, graph(""))));            // another order
  CHECK(refused(number(1, 10) + number(1, 10) + rest));                   // twice
  CHECK(refused(std::string("\x08\x8a\x00", 3) + rest));                  // a long number
  CHECK(refused(std::string("\x88\x00\x0a", 3) + rest));                  // a long tag
  CHECK(refused(std::string("\x0d\x0a\x00\x00\x00", 5) + rest));          // a number's field in another wire type
  CHECK(refused(number(1, 10) + bytes(2, "\xff") + rest));                // not UTF-8
  CHECK(refused(model("", bytes(99, "unknown"))));                        // unknown
  CHECK(refused(model("") + varint(60 << 3 | 3) + varint(60 << 3 | 4)));  // a group
  CHECK(refused(model("") + varint(60 << 3 | 4)));                        // the end of one
  CHECK(refused(model(bytes(5, number(14, 2)))));                         // no such value
  CHECK(refused(model(bytes(5, number(14, (std::uint64_t{1} << 32) + 1)))));
  CHECK(refused(model(bytes(5, number(2, std::uint64_t{1} << 31)))));       // beyond int32
  CHECK(refused(model(bytes(5, bytes(1, "\x01")))));                        // packed, and should not be
  CHECK(refused(model(bytes(5, number(5, 1)))));                            // should be packed
  CHECK(refused(model(bytes(5, bytes(4, "")))));                            // packed and empty
  CHECK(refused(model(bytes(5, bytes(4, "abc")))));                         // packed and cut
  CHECK(refused(model(bytes(13, bytes(2, bytes(1, "") + bytes(4, ""))))));  // two of a choice
  std::string deep;  // sequences of sequences: 97 types and sequences lie in three messages
  for (int i = 0; i < 97; ++i) deep = bytes(i % 2 ? 1 : 4, deep);
  CHECK(refusal(model(bytes(13, bytes(2, deep)))) == "");
  CHECK(refused(model(bytes(13, bytes(2, bytes(4, bytes(1, deep)))))));
}

TEST_CASE("only known operators, attributes and weights are let through") {
  const std::string axis = bytes(1, "axis") + number(3, 1) + number(20, 2);
  CHECK(refusal(model(node("Softmax", axis))) == "");
  CHECK(says(model(node("Loop")), "is 'Loop'"));
  CHECK(says(model(node("Relu", axis)), "has an attribute"));
  CHECK(says(model(bytes(1, bytes(4, "Softmax") + bytes(5, axis) + bytes(5, axis))), "has an attribute"));
  CHECK(says(model(node("Softmax", bytes(1, "axis") + bytes(6, "") + number(20, 5))), "has an attribute that is not"));
  CHECK(says(model("", bytes(8, bytes(1, "com.microsoft"))), "other operators than the standard"));
  CHECK(refusal(model(weight(number(1, 2) + number(1, 3), 1, 24))) == "");
  CHECK(says(model(weight(number(1, 2) + number(1, 3), 1, 23)), "has 23 bytes, and its shape and type take 24"));
  CHECK(says(model(weight("", 8, 4)), "has the type 8"));
  CHECK(says(model(weight(number(1, std::uint64_t(-1)), 1, 4)), "impossible shape"));
  const std::string half = number(1, std::uint64_t{1} << 32);
  CHECK(says(model(weight(half + half, 1, 0)), "more than any file"));
  CHECK(refusal(model(weight(half + half + number(1, 0), 1, 0))) == "");
}
