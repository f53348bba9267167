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
  return bytes(8, "w") + entry("location", location) + entry("offset", offset) + number(14, 1);
}

std::string model(const std::string& graph_extra, const std::string& model_extra = "") {
  return number(1, 10) + bytes(8, number(2, 23)) +
         bytes(7, bytes(11, value_info("x")) + bytes(12, value_info("y")) + graph_extra) + model_extra;
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
  CHECK(refusal(model(bytes(5, tensor("g.onnx.data")), bytes(99, "unknown") + number(98, 1))) == "");
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
  const std::string node =
      bytes(1, bytes(5, bytes(5, bytes(8, "w") + number(14, 1)) + bytes(5, tensor("g.onnx.data"))));
  CHECK(says(model(node), "not an ONNX file"));
  CHECK(says(model("") + bytes(7, bytes(5, tensor("/etc/passwd"))), "not an ONNX file"));
}

TEST_CASE("damaged wire format is refused") {
  const std::string good = model(bytes(5, tensor("g.onnx.data")));
  for (std::size_t cut = 1; cut < good.size(); ++cut) CHECK(refusal(good.substr(0, cut)) != "");
  CHECK(says("\x0a\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x7F", "not an ONNX file"));
  CHECK(says(std::string(1, '\0'), "not an ONNX file"));            // field number 0
  CHECK(says(model("", varint(99 << 3 | 4)), "not an ONNX file"));  // the end of a group that never began
  CHECK(refusal(model("", varint(99 << 3 | 3) + number(1, 5) + varint(99 << 3 | 4))) == "");  // a whole group
  std::string deep = bytes(5, tensor("g.onnx.data"));
  for (int i = 0; i < 2000; ++i) deep = bytes(1, bytes(5, bytes(6, deep)));
  CHECK(says(model(deep), "not an ONNX file"));
}

TEST_CASE("what the check does not know is noticed before an engine reads it") {
  CHECK(is_all_known(model(bytes(5, tensor("g.onnx.data")))));
  CHECK_FALSE(is_all_known(model("", bytes(99, "unknown"))));
  CHECK_FALSE(is_all_known(model("", bytes(1, "a number's field, but bytes"))));
  CHECK_FALSE(is_all_known(model(bytes(1, bytes(5, bytes(6, number(77, 1)))))));
}
