// Reading what the manifest says of one graph: its files, tensors and shapes.
#pragma once

#include <string>

#include "bundle/json_fields.hpp"
#include "bundle/manifest.hpp"

namespace tmd::internal {

GraphInfo read_graph(const Field& field);  // throws Error(BUNDLE) that names the place

DType dtype_of(const std::string& name);  // of a name that dtype_name gives

}  // namespace tmd::internal
