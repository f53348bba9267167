#include "engines/engine.hpp"

#include "base/quote.hpp"
#include "base/stopping.hpp"
#ifdef TMD_WITH_OPENVINO
#include "engines/openvino_engine.hpp"
#endif
#ifdef TMD_WITH_ONNXRUNTIME
#include "engines/onnxruntime_engine.hpp"
#endif
#if defined(TMD_WITH_TENSORRT) || defined(TMD_WITH_TENSORRT_RTX)
#include "engines/tensorrt_engine.hpp"
#endif

// Set by CMake: "openvino, onnxruntime, tensorrt-rtx, tensorrt".
#ifndef TMD_ENGINES
#define TMD_ENGINES "none"
#endif

namespace tmd::internal {
namespace {

struct Known {
  const char *name, *device;
  bool takes_plans;
  std::shared_ptr<Engine> (*open)(const EngineOptions&);
};

// In the order of "auto": the one with the faster steps first (docs/speed.md), and last those that need plans which
// somebody has built; of the two the one that leaves cards which are not its own to the other.
constexpr Known kKnown[] = {
#ifdef TMD_WITH_OPENVINO
    {"openvino", "cpu", false, open_openvino},
#endif
#ifdef TMD_WITH_ONNXRUNTIME
    {"onnxruntime", "cpu", false, open_onnxruntime},
#endif
#ifdef TMD_WITH_TENSORRT_RTX
    {"tensorrt-rtx", "cuda", true, tensorrt_rtx::open},
#endif
#ifdef TMD_WITH_TENSORRT
    {"tensorrt", "cuda", true, tensorrt::open},
#endif
    {nullptr, nullptr, false, nullptr}};

std::shared_ptr<Engine> open_first(const EngineOptions& options) {
  std::string reasons;
  for (const Known* each = kKnown; each->name; ++each) {
    if (options.device != "auto" && options.device != each->device) continue;
    if (!options.plans.empty() && !each->takes_plans) continue;
    try {
      return each->open(options);
    } catch (const Error& error) {
      reasons += (reasons.empty() ? "" : " ") + std::string(error.what());
    }
  }
  fail_engine(reasons.empty() ? "this library was built without an engine for this device: build it with the headers "
                                "of one (docs/embedding.md)."
                              : reasons);
}

}  // namespace

std::unique_ptr<Step> LoadedGraph::bind(const Buffers& inputs, const Buffers& outputs) {
  check_stopped();  // an engine may compile for seconds, which nothing interrupts
  const std::pair<const std::vector<TensorSpec>&, const Buffers&> sides[] = {{info().inputs, inputs},
                                                                             {info().outputs, outputs}};
  for (const auto& [specs, buffers] : sides) {
    bool fits = specs.size() == buffers.size();
    for (const TensorSpec& spec : specs) {
      const auto found = buffers.find(spec.name);
      fits = fits && found != buffers.end() && found->second.dtype() == spec.dtype &&
             found->second.shape().size() == spec.shape.size();
    }
    if (!fits)
      fail_run("the graph " + info().file + " of this bundle has other tensors than the run has buffers for. " +
               "Export the bundle again.");
  }
  return tie(inputs, outputs);
}

void check_threads(std::int32_t threads) {
  if (threads != TMD_DEFAULT && (threads < 1 || threads > 1024))
    refuse_usage("threads is " + std::to_string(threads) + ": give 1 to 1024, or TMD_DEFAULT.");
}

std::shared_ptr<Engine> open_engine(const EngineOptions& options) {
  if (options.device != "auto" && options.device != "cpu" && options.device != "cuda")
    refuse_usage("there is no device " + quote(options.device) + " in this version of tmd: use cpu or cuda.");
  if (options.engine == "auto") return open_first(options);
  for (const Known* each = kKnown; each->name; ++each) {
    if (options.engine != each->name) continue;
    if (options.device != "auto" && options.device != each->device)
      refuse_usage("the engine " + options.engine + " runs on the device " + each->device + ", not on " +
                   options.device + ": leave out one of them.");
    if (!options.plans.empty() && !each->takes_plans)
      refuse_usage("the engine " + options.engine +
                   " takes no plans: leave them out, or choose the engine that they are for.");
    return each->open(options);
  }
  refuse_usage("there is no engine " + quote(options.engine) +
               " in this library: use auto, or one of: " TMD_ENGINES ".");
}

void check_graph_types(const GraphInfo& info) {
  for (const auto* tensors : {&info.inputs, &info.outputs})
    for (const TensorSpec& spec : *tensors)
      if (spec.dtype == DType::bf16)
        fail_engine("the graph " + info.file +
                    " has bfloat16 inputs or outputs, which the runtime has no buffers for: "
                    "export it again with this version.");
}

}  // namespace tmd::internal
