#include "engines/onnx_nodes.hpp"

#include "bundle/protobuf_wire.hpp"

namespace tmd::internal {
namespace {

// Field numbers of ONNX's messages, and AttributeProto.AttributeType.
constexpr std::uint32_t kNodeInput = 1, kNodeOutput = 2, kNodeName = 3, kNodeOpType = 4, kNodeAttribute = 5;
constexpr std::uint32_t kAttributeName = 1, kAttributeI = 3, kAttributeType = 20;
constexpr std::uint64_t kTypeInt = 2;

}  // namespace

std::string int_attribute(const std::string& name, std::int64_t value) {
  WireWriter out;
  out.bytes(kAttributeName, name);
  out.number(kAttributeI, static_cast<std::uint64_t>(value));
  out.number(kAttributeType, kTypeInt);
  return out.data();
}

std::string make_node(const std::string& prefix, const std::string& op_type, const std::vector<std::string>& inputs,
                      const std::string& output, const std::vector<std::pair<std::string, std::int64_t>>& attributes) {
  WireWriter out;
  for (const std::string& name : inputs) out.bytes(kNodeInput, name);
  out.bytes(kNodeOutput, output);
  out.bytes(kNodeName, prefix + output);
  out.bytes(kNodeOpType, op_type);
  for (const auto& [name, value] : attributes) out.bytes(kNodeAttribute, int_attribute(name, value));
  return out.data();
}

}  // namespace tmd::internal
