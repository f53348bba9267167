// Any bytes as an ONNX file: accepted or Error(BUNDLE), nothing else. What an engine might get is lowered, and stays
// ONNX as we know it.
#include "base/error.hpp"
#include "bundle/graph_file.hpp"
#include "engines/onnxruntime_lowering.hpp"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  using namespace tmd::internal;
  const std::string_view content(reinterpret_cast<const char*>(data), size);
  GraphInfo info;
  info.file = "flow_head.onnx";
  info.data = "flow_head.onnx.data";
  info.opset = 23;
  info.inputs = {{"y", DType::f32, {{1, "batch"}, {16, ""}, {1, "frames"}, {1, "height"}, {1, "width"}}}};
  info.outputs = {{"y_next", DType::f32, {{1, "batch"}, {16, ""}, {1, "frames"}, {1, "height"}, {1, "width"}}}};
  try {
    check_graph(content, info, 1 << 30, "flow_head.onnx");
  } catch (const Error& error) {
    if (error.status() != TMD_ERROR_BUNDLE) __builtin_trap();
    // The interface is looked at last: with the right manifest this graph would pass.
    if (std::string(error.what()).find("differ from the manifest's") == std::string::npos) return 0;
  }
  if (is_all_known(content) && !is_all_known(lower_for_onnxruntime(content, "graph.onnx", false))) __builtin_trap();
  return 0;
}
