#include "bundle/graph_shapes.hpp"

#include "base/error.hpp"
#include "base/quote.hpp"
#include "base/saturating.hpp"
#include "bundle/protobuf_wire.hpp"
#include "bundle/shape_walk.hpp"

namespace tmd::internal {
namespace {

// Field numbers of ONNX's messages.
constexpr std::uint32_t kModelGraph = 7;
constexpr std::uint32_t kGraphNode = 1, kGraphInitializer = 5, kGraphInput = 11, kGraphOutput = 12;
constexpr std::uint32_t kNodeInput = 1, kNodeOutput = 2, kNodeName = 3, kNodeOpType = 4, kNodeAttribute = 5;
constexpr std::uint32_t kAttributeName = 1, kAttributeInt = 3, kAttributeText = 4, kAttributeInts = 8;

ShapedNode read_node(std::string_view data) {
  ShapedNode node;
  node.name = last_text(data, kNodeName);
  node.op_type = last_text(data, kNodeOpType);
  node.inputs = all_fields(data, kNodeInput);
  node.outputs = all_fields(data, kNodeOutput);
  for (const std::string_view attribute : all_fields(data, kNodeAttribute))
    node.attributes[last_text(attribute, kAttributeName)] = attribute;
  return node;
}

}  // namespace

std::uint64_t ShapedTensor::elements() const {
  std::uint64_t product = 1;
  for (const std::int64_t size : shape)
    if (size == 0) return 0;
  for (const std::int64_t size : shape)
    if (__builtin_mul_overflow(product, static_cast<std::uint64_t>(size), &product)) return UINT64_MAX;
  return product;
}

bool ShapedTensor::is_low() const { return type == kFloat16 || type == kBfloat16; }

bool ShapedTensor::is_widened(const Holding& holding) const {
  return type == kFloat16 || (holding.widens_bfloat16 && type == kBfloat16);
}

std::uint64_t ShapedTensor::bytes(const Holding& holding) const {
  return is_widened(holding) ? times(elements(), 4) : stored_bytes();
}

std::uint64_t ShapedTensor::stored_bytes() const { return times(elements(), item_bytes(type)); }

std::int64_t ShapedNode::number(std::string_view attribute, std::int64_t otherwise) const {
  const auto found = attributes.find(attribute);
  return found == attributes.end() ? otherwise : last_number(found->second, kAttributeInt);
}

std::vector<std::int64_t> ShapedNode::numbers(std::string_view attribute) const {
  std::vector<std::int64_t> values;
  const auto found = attributes.find(attribute);
  if (found == attributes.end()) return values;
  WireReader reader(found->second);
  for (WireField field; reader.next(&field);)
    if (field.number == kAttributeInts) values.push_back(static_cast<std::int64_t>(field.varint));
  return values;
}

std::string_view ShapedNode::word(std::string_view attribute) const {
  const auto found = attributes.find(attribute);
  return found == attributes.end() ? std::string_view() : last_text(found->second, kAttributeText);
}

ShapedGraph infer_shapes(std::string_view data, const InputShapes& input_shapes, const std::string& where) {
  ShapedGraph graph;
  const std::string_view body = last_text(data, kModelGraph);
  Walk walk(graph);
  const auto unsizable = [&](const std::string& what, const std::string& reason) {
    refuse_bundle(where + " cannot be sized: " + what + ": " + reason +
                  ". Export the graph with the newest tmd-export.");
  };
  try {
    for (const std::string_view weight : all_fields(body, kGraphInitializer)) walk.add_weight(weight);
  } catch (const Unsizable& error) {
    unsizable("a weight", error.reason);
  }
  for (const std::string_view value : all_fields(body, kGraphInput)) {
    const std::string_view name = last_text(value, 1);
    const auto shape = input_shapes.find(std::string(name));
    if (shape == input_shapes.end()) unsizable("input " + quote(name), "nothing says how large it is");
    graph.inputs.push_back(name);
    graph.tensors[name] = {last_number(last_text(last_text(value, 2), 1), 1), shape->second};
  }
  for (const std::string_view value : all_fields(body, kGraphOutput)) graph.outputs.push_back(last_text(value, 1));
  for (const std::string_view node : all_fields(body, kGraphNode)) graph.nodes.push_back(read_node(node));
  for (const ShapedNode& node : graph.nodes) {
    try {
      walk.add_node(node);
    } catch (const Unsizable& error) {
      unsizable("node " + std::string(node.op_type) + " " + quote(node.name), error.reason);
    }
  }
  return graph;
}

}  // namespace tmd::internal
