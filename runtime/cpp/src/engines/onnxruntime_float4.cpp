#include "engines/onnxruntime_float4.hpp"

#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "base/quote.hpp"
#include "bundle/protobuf_wire.hpp"
#include "engines/onnx_nodes.hpp"

namespace tmd::internal {
namespace {

// Field numbers of ONNX's messages.
constexpr std::uint32_t kModelGraph = 7;
constexpr std::uint32_t kGraphNode = 1, kGraphInitializer = 5, kGraphValueInfo = 13;
constexpr std::uint32_t kNodeInput = 1, kNodeOutput = 2, kNodeName = 3, kNodeOpType = 4, kNodeAttribute = 5;
constexpr std::uint32_t kTensorDims = 1, kTensorDataType = 2, kTensorName = 8, kTensorRawData = 9;
constexpr std::uint32_t kAttributeName = 1, kAttributeI = 3, kAttributeType = 20;
// AttributeProto.AttributeType and TensorProto.DataType.
constexpr std::int64_t kTypeInt = 2;
constexpr std::int64_t kFloat32 = 1, kUint8 = 2, kInt32 = 6, kInt64 = 7, kFloat8 = 17, kFloat4 = 23;
constexpr std::int64_t kBlock = 16;
constexpr float kValues[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6};

// The whole number that a node's attribute says; `missing` if it has none of that name.
std::int64_t number_of(std::string_view node, std::string_view name, std::int64_t missing) {
  for (const std::string_view attribute : all_fields(node, kNodeAttribute))
    if (last_text(attribute, kAttributeName) == name && last_number(attribute, kAttributeType) == kTypeInt)
      return last_number(attribute, kAttributeI);
  return missing;
}

template <typename T>
std::string bytes_of(const std::vector<T>& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

class Lowering {
 public:
  explicit Lowering(const std::string& where) : where_(where) {}

  void add_weight(std::string_view tensor) {
    if (last_number(tensor, kTensorDataType) == kFloat4)
      take_apart(tensor);
    else
      initializers_.emplace_back(tensor);
  }

  void add_node(std::string_view node) {
    if (last_text(node, kNodeOpType) != "QuantizeLinear" || number_of(node, "output_dtype", 0) != kFloat4) {
      nodes_.emplace_back(node);
      return;
    }
    if (number_of(node, "axis", 1) != -1 || number_of(node, "block_size", 0) != kBlock ||
        count_fields(node, kNodeInput) != 2)
      refuse_bundle(where_ + ": node QuantizeLinear " + quote(last_text(node, kNodeName)) +
                    " quantizes to float4 in another form than blocks of 16 along the last axis. Make the bundle " +
                    "again with tmd-export, and do not run graphs from elsewhere.");
    round(node);
  }

  bool changed() const { return changed_; }

  std::string graph(std::string_view before) const {
    WireWriter out;
    for (const std::string& node : nodes_) out.bytes(kGraphNode, node);
    for (const std::string& tensor : initializers_) out.bytes(kGraphInitializer, tensor);
    for (const std::string& tensor : constants_) out.bytes(kGraphInitializer, tensor);
    WireReader reader(before);
    for (WireField field; reader.next(&field);)
      if (field.number != kGraphNode && field.number != kGraphInitializer && field.number != kGraphValueInfo)
        out.copy(field);
    return in_field_order(out.data());
  }

 private:
  std::string add(const std::string& op_type, const std::vector<std::string>& inputs, const std::string& output,
                  const std::vector<std::pair<std::string, std::int64_t>>& attributes = {}) {
    nodes_.push_back(make_node("float4/", op_type, inputs, output, attributes));
    return output;
  }

  std::string constant(const std::string& name, const std::vector<std::int64_t>& dims, std::int64_t type,
                       const std::string& content) {
    const std::string full = "float4/" + name;
    if (!known_.insert(full).second) return full;
    WireWriter tensor;
    for (const std::int64_t size : dims) tensor.number(kTensorDims, static_cast<std::uint64_t>(size));
    tensor.number(kTensorDataType, static_cast<std::uint64_t>(type));
    tensor.bytes(kTensorName, full);
    tensor.bytes(kTensorRawData, content);
    constants_.push_back(tensor.data());
    return full;
  }

  std::string integers(const std::string& name, const std::vector<std::int64_t>& values) {
    return constant(name, {static_cast<std::int64_t>(values.size())}, kInt64, bytes_of(values));
  }

  std::string number(const char* name, float value) {
    return constant(name, {}, kFloat32, bytes_of(std::vector<float>{value}));
  }

  // A weight becomes bytes, and nodes that make of each byte its two values, the one in the low bits first.
  void take_apart(std::string_view tensor) {
    changed_ = true;
    const std::string name(last_text(tensor, kTensorName));
    std::vector<std::int64_t> dims;
    std::int64_t count = 1;
    std::string shown;
    WireWriter bytes;
    WireReader reader(tensor);
    for (WireField field; reader.next(&field);) {
      if (field.number == kTensorDims) {
        dims.push_back(static_cast<std::int64_t>(field.varint));
        count *= dims.back();
        shown += (shown.empty() ? "" : "x") + std::to_string(dims.back());
      } else if (field.number != kTensorDataType && field.number != kTensorName) {
        bytes.copy(field);
      }
    }
    bytes.number(kTensorDims, static_cast<std::uint64_t>(count / 2));
    bytes.number(kTensorDataType, static_cast<std::uint64_t>(kUint8));
    bytes.bytes(kTensorName, name + ".bytes");
    initializers_.push_back(in_field_order(bytes.data()));

    std::vector<float> pairs;
    for (std::size_t byte = 0; byte < 256; ++byte) pairs.insert(pairs.end(), {kValues[byte & 15], kValues[byte >> 4]});
    const std::string shape = integers("shape/" + shown, dims);
    const std::string codes = add("Cast", {name + ".bytes"}, name + ".codes", {{"to", kInt32}});
    const std::string table = constant("pairs", {256, 2}, kFloat32, bytes_of(pairs));
    const std::string both = add("Gather", {table, codes}, name + ".pairs", {{"axis", 0}});
    const std::string values = add("Reshape", {both, shape}, name + ".values");
    add("Cast", {values}, name, {{"to", kFloat8}});
  }

  // x divided by the scales of its blocks, in float32, and rounded to the nearest value of E2M1, ties to even.
  void round(std::string_view node) {
    changed_ = true;
    const std::vector<std::string_view> inputs = all_fields(node, kNodeInput);
    const std::string x(inputs[0]), scales(inputs[1]), name(last_text(node, kNodeOutput));
    const std::string wide = add("Cast", {x}, name + ".wide", {{"to", kFloat32}});
    const std::string grid = add("Shape", {scales}, name + ".grid");
    const std::string blocks = add("Concat", {grid, integers("block", {kBlock})}, name + ".blocks", {{"axis", 0}});
    const std::string rows = add("Reshape", {wide, blocks}, name + ".rows");
    const std::string steps = add("Unsqueeze", {scales, integers("last", {-1})}, name + ".steps");
    const std::string ratio = add("Div", {rows, steps}, name + ".ratio");
    const std::string size = add("Abs", {ratio}, name + ".size");
    const std::string two = number("2", 2), four = number("4", 4), half = number("0.5", .5f), one = number("1", 1);
    const std::string below2 = add("Less", {size, two}, name + ".below2");
    const std::string below4 = add("Less", {size, four}, name + ".below4");
    const std::string fine = add("Where", {below2, half, one}, name + ".fine");
    const std::string apart = add("Where", {below4, fine, two}, name + ".apart");
    const std::string exact = add("Div", {ratio, apart}, name + ".exact");
    const std::string whole = add("Round", {exact}, name + ".whole");
    const std::string near = add("Mul", {whole, apart}, name + ".near");
    const std::string least = number("-6", -6), most = number("6", 6);
    const std::string ended = add("Clip", {near, least, most}, name + ".ended");
    const std::string shape = add("Shape", {x}, name + ".shape");
    const std::string values = add("Reshape", {ended, shape}, name + ".values");
    add("Cast", {values}, name, {{"to", kFloat8}});
  }

  const std::string& where_;
  bool changed_ = false;
  std::vector<std::string> nodes_, initializers_, constants_;
  std::set<std::string> known_;
};

}  // namespace

std::string float4_to_float8(std::string_view model, const std::string& where) {
  const std::string_view graph = last_text(model, kModelGraph);
  Lowering lowering(where);
  for (const std::string_view tensor : all_fields(graph, kGraphInitializer)) lowering.add_weight(tensor);
  for (const std::string_view node : all_fields(graph, kGraphNode)) lowering.add_node(node);
  if (!lowering.changed()) return std::string(model);
  WireWriter out;
  WireReader reader(model);
  for (WireField field; reader.next(&field);)
    if (field.number != kModelGraph) out.copy(field);
  out.bytes(kModelGraph, lowering.graph(graph));
  return in_field_order(out.data());
}

}  // namespace tmd::internal
