// What a graph of a bundle may be made of: operators that tmd-export writes, with their attributes, and plain tensors.
// The tables are Python's (tmd_engines/bundle/operators.py says why).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tmd::internal {

struct OperatorAttribute {
  std::string_view op_type, attribute;
};

struct TensorType {
  std::int64_t number;  // TensorProto's
  std::uint64_t bits;   // of a value
};

#include "bundle/operators.inc"

// Why a graph in canonical encoding may not be run; "": it is made of nothing else.
std::string operators_problem(std::string_view model);

}  // namespace tmd::internal
