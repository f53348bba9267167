// Changes that ONNX Runtime on a CPU wants in a graph; made in memory, never stored in a bundle.
#pragma once

#include <string>
#include <string_view>

namespace tmd::internal {

// The ONNX file `stored` with the changes of tmd_engines.onnxruntime.lowering:
//   - float4 tensors become float8 ones (onnxruntime_float4.hpp);
//   - float16 and bfloat16 tensors between inputs and outputs become float32, weights by a Cast behind each; an input or
//     output of those types keeps it, with a Cast beside it;
//   - plain 3-D Attention becomes com.microsoft.MultiHeadAttention, which never holds all scores at once;
//   - if `unsigned_activations`: int8 activations become uint8 ones, which more products are fused with;
//   - nodes that nothing reads come last, in an order that lets ONNX Runtime free memory early.
// `weights` is the name of the file that they lie in; empty: the one that the graph names.
// For graphs that check_graph has accepted; the encoding stays canonical. `where` names the file in messages.
// Throws Error(BUNDLE) for a Cast that does not say to what.
std::string lower_for_onnxruntime(std::string_view stored, const std::string& where, bool unsigned_activations,
                                  const std::string& weights = "");

// Whether the large weights of a lowered file that have a Cast behind them may stay in 16 bits in memory: where only
// products of matrices read them.
bool widens_in_products(std::string_view lowered);

}  // namespace tmd::internal
