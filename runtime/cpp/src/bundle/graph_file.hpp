// Checks of one ONNX file before an engine sees it: weights only from its own data file, interface as in the manifest.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "bundle/manifest.hpp"

namespace tmd::internal {

// Throws Error(BUNDLE) unless the ONNX file `data` is in the canonical encoding, made of known operators, keeps to its
// own data file of `data_size` bytes and is what `info` says; `where` names it in messages.
void check_graph(std::string_view data, const GraphInfo& info, std::uint64_t data_size, const std::string& where);

}  // namespace tmd::internal
