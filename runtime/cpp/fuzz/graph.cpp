// Any bytes as an ONNX file: accepted or Error(BUNDLE), nothing else, and the same of its lowering and of its sizes. What
// an engine gets stays canonical ONNX.
#include "base/error.hpp"
#include "bundle/geometry.hpp"
#include "bundle/graph_file.hpp"
#include "bundle/graph_shapes.hpp"
#include "bundle/holding.hpp"
#include "bundle/onnx_encoding.hpp"
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
  const auto checked = [](const auto& check) {
    try {
      return check();
    } catch (const Error& error) {
      if (error.status() != TMD_ERROR_BUNDLE) __builtin_trap();
      // The interface is looked at last: with the right manifest this graph would pass.
      return std::string(error.what()).find("differ from the manifest's") != std::string::npos;
    }
  };
  const auto check = [&] {
    check_graph(content, info, 1 << 30, "flow_head.onnx");
    return true;
  };
  if (!checked(check)) return 0;
  checked([&] {
    facts_of(content, info);
    InputShapes shapes;  // of the built-in student's flow head
    for (const char* name : {"y", "noise"}) shapes[name] = {1, 16, 3, 8, 12};
    for (const char* name : {"s", "r"}) shapes[name] = {1};
    for (const char* name : {"rope_cos", "rope_sin"}) shapes[name] = {72, 16};
    shapes["features"] = {1, 72, 128};
    shapes["context"] = {1, 32, 128};
    for (const char* name : {"x", "velocity", "negative", "before_1", "before_2"}) shapes[name] = {1, 16, 3, 8, 12};
    shapes["coefficients"] = {7};
    const ShapedGraph graph = infer_shapes(content, shapes, "graph.onnx");
    for (const Holding& holding : {kOnnxRuntimeHolding, kOpenVinoHolding}) peak_activation_bytes(graph, holding);
    return true;
  });
  for (const bool is_unsigned : {false, true})
    checked([&] {
      if (!is_canonical_onnx(lower_for_onnxruntime(content, "graph.onnx", is_unsigned))) __builtin_trap();
      return true;
    });
  return 0;
}
