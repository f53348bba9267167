// Checks of one ONNX file before an engine sees it: weights only from its own data file, interface as in the manifest.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "bundle/manifest.hpp"

namespace tmd::internal {

inline constexpr std::uint64_t kMaxGraphBytes = std::uint64_t{64} << 20;  // weights belong into the data file
inline constexpr std::size_t kMaxNodes = 100000;

// Throws Error(BUNDLE) unless the ONNX file `data` keeps to its own data file of `data_size` bytes and is what `info`
// says; `where` names it in messages.
void check_graph(std::string_view data, const GraphInfo& info, std::uint64_t data_size, const std::string& where);

// Whether an ONNX file consists of fields that the check knows, and nothing else that an engine might read.
bool is_all_known(std::string_view data);

}  // namespace tmd::internal
