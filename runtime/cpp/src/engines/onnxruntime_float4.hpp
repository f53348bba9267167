// Tensors in float4 (E2M1) for ONNX Runtime on a CPU, which has no operator for them; made in memory, never stored.
#pragma once

#include <string>
#include <string_view>

namespace tmd::internal {

// The ONNX file `model` with every tensor in float4 as one in float8 (E4M3), which holds its values: message by message
// what tmd_engines.onnxruntime.float4 makes. A file without float4 comes back as it is. For graphs that check_graph has
// accepted. Throws Error(BUNDLE) for a quantization to float4 in another form than a bundle's.
std::string float4_to_float8(std::string_view model, const std::string& where);

}  // namespace tmd::internal
