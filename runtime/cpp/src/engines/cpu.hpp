// What this machine's processor can do, as Linux says it.
#pragma once

#include <string>

namespace tmd::internal {

// Whether the CPU sums products of uint8 and int8 exactly (VNNI). Without, pairs of them saturate at 16 bits. As Python
// asks it (tmd_engines.onnxruntime.engine): what one fuses, the other fuses. `root` is where /proc is.
bool fast_unsigned_products(const std::string& root = "");

}  // namespace tmd::internal
