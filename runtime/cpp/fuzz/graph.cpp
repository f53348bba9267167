// Any bytes as an ONNX file: accepted or Error(BUNDLE), nothing else.
#include "error.hpp"
#include "graph_file.hpp"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  using namespace tmd::internal;
  const std::string_view content(reinterpret_cast<const char*>(data), size);
  GraphInfo info;
  info.file = "text_encoder.onnx";
  info.data = "text_encoder.onnx.data";
  info.opset = 23;
  info.inputs = {{"input_ids", DType::i64, {{1, "batch"}, {1, "text"}}},
                 {"attention_mask", DType::i64, {{1, "batch"}, {1, "text"}}}};
  info.outputs = {{"prompt_embeds", DType::f32, {{1, "batch"}, {1, "text"}, {64, ""}}}};
  try {
    check_graph(content, info, 1 << 20, "text_encoder.onnx");
    is_all_known(content);
  } catch (const Error& error) {
    if (error.status() != TMD_ERROR_BUNDLE) __builtin_trap();
  }
  return 0;
}
