// Pieces of an ONNX graph, as protobuf writes them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace tmd::internal {

std::string int_attribute(const std::string& name, std::int64_t value);

// A node of the standard domain with one output, named after it behind `prefix`.
std::string make_node(const std::string& prefix, const std::string& op_type, const std::vector<std::string>& inputs,
                      const std::string& output, const std::vector<std::pair<std::string, std::int64_t>>& attributes);

}  // namespace tmd::internal
