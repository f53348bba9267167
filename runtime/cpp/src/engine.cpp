#include "engine.hpp"

#include "quote.hpp"
#ifdef TMD_WITH_OPENVINO
#include "openvino_engine.hpp"
#endif
#ifdef TMD_WITH_ONNXRUNTIME
#include "onnxruntime_engine.hpp"
#endif

// Set by CMake: "openvino, onnxruntime".
#ifndef TMD_ENGINES
#define TMD_ENGINES "none"
#endif

namespace tmd::internal {
namespace {

struct Known {
  const char* name;
  std::shared_ptr<Engine> (*open)(const EngineOptions&);
};

// In the order of "auto": the one with the faster steps first (docs/speed.md).
constexpr Known kKnown[] = {
#ifdef TMD_WITH_OPENVINO
    {"openvino", open_openvino},
#endif
#ifdef TMD_WITH_ONNXRUNTIME
    {"onnxruntime", open_onnxruntime},
#endif
    {nullptr, nullptr}};

std::shared_ptr<Engine> open_first(const EngineOptions& options) {
  std::string reasons;
  for (const Known* each = kKnown; each->name; ++each) {
    try {
      return each->open(options);
    } catch (const Error& error) {
      reasons += (reasons.empty() ? "" : " ") + std::string(error.what());
    }
  }
  fail_engine(reasons.empty() ? "this library was built without an engine: build it with the headers of one "
                                "(docs/embedding.md)."
                              : reasons);
}

}  // namespace

std::shared_ptr<Engine> open_engine(const EngineOptions& options) {
  if (options.device != "cpu")
    refuse_usage("there is no device " + quote(options.device) + " in this version of tmd: use cpu.");
  if (options.threads != TMD_DEFAULT && (options.threads < 1 || options.threads > 1024))
    refuse_usage("threads is " + std::to_string(options.threads) + ": give 1 to 1024, or TMD_DEFAULT.");
  if (options.engine == "auto") return open_first(options);
  for (const Known* each = kKnown; each->name; ++each)
    if (options.engine == each->name) return each->open(options);
  refuse_usage("there is no engine " + quote(options.engine) +
               " in this library: use auto, or one of: " TMD_ENGINES ".");
}

void check_cpu_graph(const std::string& engine, const GraphInfo& info) {
  if (info.precision != "fp32" && info.precision != "fp16" && info.precision != "bf16")
    fail_engine("the graph " + info.file + " is " + info.precision + ", and the engine " + engine +
                " computes fp32, fp16 and bf16 in this library: use such a bundle.");
  for (const auto* tensors : {&info.inputs, &info.outputs})
    for (const TensorSpec& spec : *tensors)
      if (spec.dtype == DType::bf16)
        fail_engine("the graph " + info.file +
                    " has bfloat16 inputs or outputs, which the runtime has no buffers for: "
                    "export it again with this version.");
}

}  // namespace tmd::internal
