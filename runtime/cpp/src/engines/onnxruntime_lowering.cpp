#include "engines/onnxruntime_lowering.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "base/error.hpp"
#include "base/quote.hpp"
#include "base/saturating.hpp"
#include "bundle/holding.hpp"
#include "bundle/protobuf_wire.hpp"
#include "engines/onnx_nodes.hpp"
#include "engines/onnxruntime_float4.hpp"

namespace tmd::internal {
namespace {

// Field numbers of ONNX's messages.
constexpr std::uint32_t kModelGraph = 7, kModelOpset = 8;
constexpr std::uint32_t kGraphNode = 1, kGraphInitializer = 5, kGraphInput = 11, kGraphOutput = 12,
                        kGraphValueInfo = 13;
constexpr std::uint32_t kValueName = 1, kValueType = 2, kTypeTensor = 1, kTensorElement = 1;
constexpr std::uint32_t kNodeInput = 1, kNodeOutput = 2, kNodeName = 3, kNodeOpType = 4, kNodeAttribute = 5,
                        kNodeDomain = 7;
constexpr std::uint32_t kTensorDims = 1, kTensorDataType = 2, kTensorInt32Data = 5, kTensorName = 8, kTensorRawData = 9,
                        kTensorExternalData = 13;
constexpr std::uint32_t kEntryKey = 1, kEntryValue = 2;
constexpr std::uint32_t kAttributeName = 1, kAttributeF = 2, kAttributeI = 3, kAttributeType = 20, kAttributeRef = 21;
constexpr std::uint32_t kOpsetDomain = 1, kOpsetVersion = 2;
// AttributeProto.AttributeType and TensorProto.DataType.
constexpr std::uint64_t kTypeFloat = 1, kTypeInt = 2;
constexpr std::int64_t kFloat32 = 1, kUint8 = 2, kInt8 = 3, kFloat16 = 10, kBfloat16 = 16;
constexpr const char* kMicrosoft = "com.microsoft";

bool is_low(std::int64_t dtype) { return dtype == kFloat16 || dtype == kBfloat16; }

// A node with the fields that change taken apart; the rest stays as it was written.
struct Node {
  std::vector<std::string> inputs, outputs, attributes;
  std::string op_type, domain;
  WireWriter rest;  // name, documentation, ...

  explicit Node(std::string_view data) : op_type(last_text(data, kNodeOpType)), domain(last_text(data, kNodeDomain)) {
    WireReader reader(data);
    for (WireField field; reader.next(&field);) {
      if (field.number == kNodeInput)
        inputs.emplace_back(field.bytes);
      else if (field.number == kNodeOutput)
        outputs.emplace_back(field.bytes);
      else if (field.number == kNodeAttribute)
        attributes.emplace_back(field.bytes);
      else if (field.number != kNodeOpType && field.number != kNodeDomain)
        rest.copy(field);
    }
  }

  std::string data() const {
    WireWriter out;
    for (const std::string& name : inputs) out.bytes(kNodeInput, name);
    for (const std::string& name : outputs) out.bytes(kNodeOutput, name);
    out.bytes(kNodeOpType, op_type);
    for (const std::string& attribute : attributes) out.bytes(kNodeAttribute, attribute);
    if (!domain.empty()) out.bytes(kNodeDomain, domain);
    return in_field_order(rest.data() + out.data());
  }
};

std::string float_attribute(const std::string& name, float value) {
  WireWriter out;
  out.bytes(kAttributeName, name);
  out.real(kAttributeF, value);
  out.number(kAttributeType, kTypeFloat);
  return out.data();
}

float float_of(std::string_view attribute) {
  const std::optional<WireField> field = last_field(attribute, kAttributeF, 5);
  if (!field) return 0.0f;
  std::uint32_t bits = 0;
  for (std::size_t i = 0; i < 4; ++i) bits |= std::uint32_t{static_cast<unsigned char>(field->bytes[i])} << (8 * i);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::string cast_node(const std::string& source, const std::string& target, std::int64_t to) {
  return make_node("cast/", "Cast", {source}, target, {{"to", to}});
}

// The type that a Cast converts to, changed to float32 if it is a low one.
std::int64_t widen_cast(Node& node, const std::string& where) {
  for (std::string& attribute : node.attributes) {
    if (last_text(attribute, kAttributeName) != "to" || !last_text(attribute, kAttributeRef).empty() ||
        last_number(attribute, kAttributeType) != static_cast<std::int64_t>(kTypeInt))
      continue;
    const std::int64_t to = last_number(attribute, kAttributeI);
    if (is_low(to)) attribute = int_attribute("to", kFloat32);
    return to;
  }
  refuse_bundle(where + ": node Cast " + quote(last_text(node.rest.data(), kNodeName)) +
                " does not say which type it converts to. Make the bundle again with tmd-export, and do not run graphs "
                "from elsewhere.");
}

// The type of an input or output of the graph.
std::int64_t element_of(std::string_view value) {
  return last_number(last_text(last_text(value, kValueType), kTypeTensor), kTensorElement);
}

// Walks the nodes in their order, knowing of every name whether it stands for a tensor of low precision.
class Widening {
 public:
  Widening(std::string_view graph, const std::string& where) : where_(where) {
    for (const std::string_view weight : all_fields(graph, kGraphInitializer)) {
      const auto dtype = static_cast<std::int32_t>(last_number(weight, kTensorDataType));
      if (!is_low(dtype)) continue;
      const std::string name(last_text(weight, kTensorName));
      low_.insert(name);
      renamed_[name] = name + ".upcast";
      casts.emplace_back(cast_node(name, renamed_[name], kFloat32));
    }
    for (const std::string_view value : all_fields(graph, kGraphInput)) {
      if (!is_low(element_of(value))) continue;
      const std::string name(last_text(value, kValueName));
      low_.insert(name);
      renamed_[name] = name + ".upcast";
      casts.emplace_back(cast_node(name, renamed_[name], kFloat32));
    }
    for (const std::string_view node : all_fields(graph, kGraphNode))
      for (const std::string_view name : all_fields(node, kNodeInput)) read_.insert(name);
    for (const std::string_view value : all_fields(graph, kGraphOutput))
      if (is_low(element_of(value))) passed_[std::string(last_text(value, kValueName))] = element_of(value);
  }

  // Changes the node; what it gives to the caller is converted by nodes that follow it.
  std::vector<Node> widen(Node& node) {
    bool low = false;
    if (node.op_type == "Cast" && node.outputs.size() == 1 && passed_.count(node.outputs[0]) &&
        !read_.count(node.outputs[0])) {
      // It is the conversion on the way out; one more behind it would hide what it waits for.
      Node kept = node;
      widen_cast(kept, where_);
      for (std::string& name : node.inputs)
        if (const auto found = renamed_.find(name); found != renamed_.end()) name = found->second;
      return {};
    }
    if (node.op_type == "Cast") {
      low = is_low(widen_cast(node, where_));
    } else if (node.op_type != "Shape" && node.op_type != "Size" && node.op_type != "QuantizeLinear") {
      // Those give types of their own.
      for (const std::string& name : node.inputs) low = low || low_.count(name);
    }
    for (std::string& name : node.inputs)
      if (const auto found = renamed_.find(name); found != renamed_.end()) name = found->second;
    std::vector<Node> after;
    if (!low) return after;
    for (std::string& name : node.outputs) {
      if (name.empty()) continue;
      low_.insert(name);
      const auto passed = passed_.find(name);
      if (passed == passed_.end()) continue;
      const std::string given = name;
      name = renamed_[given] = given + ".wide";
      after.emplace_back(cast_node(name, given, passed->second));
    }
    return after;
  }

  bool found_any() const { return !low_.empty(); }

  std::vector<Node> casts;  // of the weights and inputs

 private:
  const std::string& where_;
  std::set<std::string> low_;
  std::map<std::string, std::string> renamed_;
  std::map<std::string, std::int64_t> passed_;  // outputs of low precision, with their types
  std::set<std::string_view> read_;
};

// int8 activations with zero point 0 become uint8 ones with zero point 128, the same values: ONNX Runtime fuses Q/DQ
// with every product of uint8 and int8, and with half of those of two int8.
class Unsigned {
 public:
  Unsigned(std::string_view graph, const std::vector<Node>& nodes) {
    std::set<std::string_view> zero_points;
    for (const Node& node : nodes)
      if (node.op_type == "QuantizeLinear" && node.inputs.size() > 2) zero_points.insert(node.inputs[2]);
    for (const std::string_view weight : all_fields(graph, kGraphInitializer))
      if (const std::string_view name = last_text(weight, kTensorName); zero_points.count(name) && is_int8_zero(weight))
        zeros_.emplace(name);
  }

  void change(Node& node) const {
    const bool converts = node.op_type == "QuantizeLinear" || node.op_type == "DequantizeLinear";
    if (converts && node.inputs.size() > 2 && zeros_.count(node.inputs[2])) node.inputs[2] += kEnding;
  }

  void add_zeros(WireWriter& graph) const {
    for (const std::string& name : zeros_) {
      WireWriter tensor;
      tensor.number(kTensorDataType, static_cast<std::uint64_t>(kUint8));
      tensor.bytes(kTensorInt32Data, "\x80\x01");  // 128
      tensor.bytes(kTensorName, name + kEnding);
      graph.bytes(kGraphInitializer, tensor.data());
    }
  }

 private:
  static constexpr const char* kEnding = ".unsigned";

  static bool is_int8_zero(std::string_view tensor) {
    if (last_number(tensor, kTensorDataType) != kInt8) return false;
    std::string_view raw, packed;
    WireReader reader(tensor);
    for (WireField field; reader.next(&field);) {
      if (field.number == kTensorDims) return false;  // not a scalar
      if (field.number == kTensorRawData) raw = field.bytes;
      if (field.number == kTensorInt32Data) packed = field.bytes;
    }
    return (raw.empty() ? packed : raw) == std::string_view("\0", 1);
  }

  std::set<std::string> zeros_;
};

// The attributes of MultiHeadAttention if it computes what this Attention does.
std::optional<std::vector<std::string>> as_multi_head(const Node& node) {
  if (node.op_type != "Attention" || !(node.domain.empty() || node.domain == "ai.onnx")) return std::nullopt;
  for (std::size_t i = 3; i < node.inputs.size(); ++i)
    if (!node.inputs[i].empty()) return std::nullopt;  // a mask, or a cache
  for (std::size_t i = 1; i < node.outputs.size(); ++i)
    if (!node.outputs[i].empty()) return std::nullopt;
  // What a plain attention may say besides its head counts; anything else keeps the standard operator.
  static const std::map<std::string_view, double> plain = {
      {"is_causal", 0}, {"qk_matmul_output_mode", 0}, {"softcap", 0}, {"softmax_precision", 1}};
  std::map<std::string_view, std::string_view> given;
  for (const std::string& attribute : node.attributes) given[last_text(attribute, kAttributeName)] = attribute;
  std::int64_t heads = 0, kv_heads = 0;
  std::optional<float> scale;
  for (const auto& [name, attribute] : given) {
    const auto type = static_cast<std::uint64_t>(last_number(attribute, kAttributeType));
    if (type != kTypeInt && type != kTypeFloat) return std::nullopt;
    const double value =
        type == kTypeInt ? static_cast<double>(last_number(attribute, kAttributeI)) : double{float_of(attribute)};
    if (name == "q_num_heads" && type == kTypeInt)
      heads = last_number(attribute, kAttributeI);
    else if (name == "kv_num_heads" && type == kTypeInt)
      kv_heads = last_number(attribute, kAttributeI);
    else if (name == "scale" && type == kTypeFloat && value != 0)
      scale = float_of(attribute);  // 0 is "not given" there
    else if (const auto known = plain.find(name); known == plain.end() || known->second != value)
      return std::nullopt;
  }
  if (!heads || (given.count("kv_num_heads") && kv_heads != heads)) return std::nullopt;  // 4-D; grouped heads
  std::vector<std::string> attributes = {int_attribute("num_heads", heads)};
  if (scale) attributes.push_back(float_attribute("scale", *scale));
  return attributes;
}

bool use_multi_head(Node& node) {
  std::optional<std::vector<std::string>> attributes = as_multi_head(node);
  if (!attributes) return false;
  node.op_type = "MultiHeadAttention";
  node.domain = kMicrosoft;
  node.attributes = std::move(*attributes);
  if (node.inputs.size() > 3) node.inputs.resize(3);
  if (node.outputs.size() > 1) node.outputs.resize(1);
  return true;
}

// ONNX Runtime begins with the last node that nothing reads, and runs all that this one needs, then the one before it.
// In the VAE the last one needs everything, and what the others keep for the next call waits until then: 2.7 times the
// memory. So those nodes come last, and of them the one that can run first comes at the very end.
std::vector<const Node*> in_lean_order(const std::vector<Node>& nodes) {
  std::set<std::string_view> read;
  std::map<std::string_view, std::ptrdiff_t> made_by;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    read.insert(nodes[i].inputs.begin(), nodes[i].inputs.end());
    for (const std::string& name : nodes[i].outputs) made_by[name] = static_cast<std::ptrdiff_t>(i);
  }
  std::vector<const Node*> ordered;
  std::vector<std::pair<std::ptrdiff_t, const Node*>> leaves;  // with the place of the last node that they wait for
  for (const Node& node : nodes) {
    bool is_read = false;
    for (const std::string& name : node.outputs) is_read = is_read || read.count(name);
    std::ptrdiff_t ready = -1;
    for (const std::string& name : node.inputs)
      if (const auto found = made_by.find(name); found != made_by.end()) ready = std::max(ready, found->second);
    if (is_read)
      ordered.push_back(&node);
    else
      leaves.emplace_back(ready, &node);
  }
  std::stable_sort(leaves.begin(), leaves.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (const auto& leaf : leaves) ordered.push_back(leaf.second);
  return ordered;
}

// A weight whose values lie in the file of this name, if they lie in a file.
std::string with_location(std::string_view tensor, const std::string& name) {
  WireWriter out;
  WireReader reader(tensor);
  for (WireField field; reader.next(&field);) {
    if (field.number != kTensorExternalData || last_text(field.bytes, kEntryKey) != "location") {
      out.copy(field);
      continue;
    }
    WireWriter entry;
    entry.bytes(kEntryKey, "location");
    entry.bytes(kEntryValue, name);
    out.bytes(kTensorExternalData, entry.data());
  }
  return out.data();
}

// What a tensor takes as float32.
std::uint64_t wide_bytes(std::string_view tensor) {
  std::uint64_t bytes = 4;
  WireReader reader(tensor);
  for (WireField field; reader.next(&field);)
    if (field.number == kTensorDims) bytes = times(bytes, field.varint);
  return bytes;
}

}  // namespace

bool widens_in_products(std::string_view lowered) {
  const std::string_view graph = last_text(lowered, kModelGraph);
  std::set<std::string_view> weights, large;
  for (const std::string_view weight : all_fields(graph, kGraphInitializer))
    if (wide_bytes(weight) > kWidenedBytes) weights.insert(last_text(weight, kTensorName));
  bool read = false;
  for (const std::string_view node : all_fields(graph, kGraphNode)) {
    const std::string_view op_type = last_text(node, kNodeOpType);
    for (const std::string_view name : all_fields(node, kNodeInput)) {
      if (op_type == "Cast" && weights.count(name)) large.insert(last_text(node, kNodeOutput));
      if (!large.count(name)) continue;
      read = true;
      if (op_type != "MatMul" && op_type != "Gemm") return false;
    }
  }
  return read;
}

std::string lower_for_onnxruntime(std::string_view stored, const std::string& where, bool unsigned_activations,
                                  const std::string& weights) {
  const std::string model = float4_to_float8(stored, where);
  const std::string_view graph = last_text(model, kModelGraph);
  Widening widening(graph, where);
  bool replaced = false;
  std::vector<Node> nodes = widening.casts;
  for (const std::string_view data : all_fields(graph, kGraphNode)) {
    Node node(data);
    std::vector<Node> after = widening.widen(node);
    replaced = use_multi_head(node) || replaced;
    nodes.push_back(std::move(node));
    for (Node& cast : after) nodes.push_back(std::move(cast));
  }

  const Unsigned activations(graph, nodes);
  if (unsigned_activations)
    for (Node& node : nodes) activations.change(node);

  WireWriter lowered;
  for (const Node* node : in_lean_order(nodes)) lowered.bytes(kGraphNode, node->data());
  WireReader parts(graph);
  for (WireField field; parts.next(&field);)
    if (field.number == kGraphInitializer && !weights.empty())
      lowered.bytes(kGraphInitializer, with_location(field.bytes, weights));
    else if (field.number != kGraphNode && !(field.number == kGraphValueInfo && widening.found_any()))
      lowered.copy(field);
  if (unsigned_activations) activations.add_zeros(lowered);

  WireWriter out;
  bool known = false;
  WireReader reader(model);
  for (WireField field; reader.next(&field);) {
    if (field.number != kModelGraph) out.copy(field);
    known = known || (field.number == kModelOpset && last_text(field.bytes, kOpsetDomain) == kMicrosoft);
  }
  out.bytes(kModelGraph, in_field_order(lowered.data()));
  if (replaced && !known) {
    WireWriter opset;
    opset.bytes(kOpsetDomain, kMicrosoft);
    opset.number(kOpsetVersion, 1);
    out.bytes(kModelOpset, opset.data());
  }
  return in_field_order(out.data());
}

}  // namespace tmd::internal
