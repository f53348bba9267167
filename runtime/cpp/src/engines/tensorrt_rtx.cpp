// TensorRT for RTX, for cards of consumers: one plan for many cards, kernels that are compiled at the first run.
#include <algorithm>
#include <array>

#include "engines/tensorrt_variant.hpp"

// Between 1.4 and 1.5 functions went from the middle of the tables, so that those of a 1.7 are none of 1.4's; and what
// it calls itself tells it from TensorRT, whose headers have the same names.
#if !defined(TRT_MAJOR_RTX) || NV_TENSORRT_MAJOR != 1 || NV_TENSORRT_MINOR < 5
#error \
    "TensorRT for RTX 1.5 or newer is needed: name its headers in TMD_TENSORRT_RTX_INCLUDE, or set TMD_TENSORRT_RTX to OFF"
#endif

namespace tmd::internal::TMD_TRT {
namespace {

using nvinfer1::EngineInvalidityDiagnostics;

constexpr Capability kServerCards[] = {{8, 0}, {9, 0}, {10, 0}, {10, 3}};

struct Reason {
  EngineInvalidityDiagnostics flag;
  const char* text;
};
constexpr Reason kReasons[] = {
    {EngineInvalidityDiagnostics::kVERSION_MISMATCH, "it is of another version"},
    {EngineInvalidityDiagnostics::kUNSUPPORTED_CC, "it is for other compute capabilities"},
    {EngineInvalidityDiagnostics::kOLD_CUDA_DRIVER, "the driver is too old, or there is none"},
    {EngineInvalidityDiagnostics::kOLD_CUDA_RUNTIME, "the CUDA runtime is too old"},
    {EngineInvalidityDiagnostics::kINSUFFICIENT_GPU_MEMORY, "the GPU has too little memory"},
    {EngineInvalidityDiagnostics::kMALFORMED_ENGINE, "it is damaged"},
    {EngineInvalidityDiagnostics::kCUDA_ERROR, "CUDA does not work"}};

// In this order: the cache goes before the configuration that it came from.
struct Made {
  std::unique_ptr<nvinfer1::IRuntimeConfig> config;
  std::unique_ptr<nvinfer1::IRuntimeCache> cache;
};

}  // namespace

const char* const kEngine = "tensorrt-rtx";
const char* const kTitle = "TensorRT for RTX";

LibraryNames library_names() {
  return {kTitle, {"libtensorrt_rtx.so." + std::to_string(NV_TENSORRT_MAJOR), "libtensorrt_rtx.so"}, ""};
}

std::string not_by_itself(const Cuda& cuda) {
  const bool of_servers =
      std::find(std::begin(kServerCards), std::end(kServerCards), cuda.capability) != std::end(kServerCards);
  if (plan_runs_on("rtx", cuda.capability) && !of_servers) return "";
  return "TensorRT for RTX is for cards of consumers, and " + cuda.device + " has compute capability " +
         to_text(cuda.capability) + ": engine \"tensorrt-rtx\" tries it.";
}

std::string refusal(const std::string& precision, Capability gpu) { return refusal_on(precision, gpu); }

PlanTarget target_of(const std::string& version, const Cuda&) { return {kEngine, version, "any", "rtx", false}; }

std::uint64_t weights_beside(const Manifest& manifest, const std::string& graph) {
  return stored_bytes_together(manifest, graph);
}

std::string refusal_of_plan(const nvinfer1::IRuntime& runtime, std::string_view plan) {
  std::uint64_t diagnostics = 0;
  if (runtime.getEngineValidity(plan.data(), static_cast<std::int64_t>(plan.size()), &diagnostics) !=
      nvinfer1::EngineValidity::kINVALID)
    return "";
  std::string found;
  for (const Reason& reason : kReasons)
    if (diagnostics & static_cast<std::uint64_t>(reason.flag))
      found += (found.empty() ? "" : " and ") + std::string(reason.text);
  return found;  // without a driver it names no reason, and loading the plan does
}

// Kernels for these sizes are compiled at once: recordings are void when others take their place later. Whole outer
// steps are recorded by us, so that the library's own CUDA graphs are off.
MadeContext make_context(nvinfer1::ICudaEngine& engine, std::string_view kernels) {
  const auto owner = std::make_shared<Made>();
  owner->config.reset(engine.createRuntimeConfig());
  if (!owner->config) return {};
  owner->config->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
  owner->config->setDynamicShapesKernelSpecializationStrategy(
      nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
  if (!owner->config->setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kDISABLED)) return {};
  owner->cache.reset(owner->config->createRuntimeCache());
  if (owner->cache) {
    // False: of another version or driver, and it stays empty.
    if (kernels.data()) owner->cache->deserialize(kernels.data(), kernels.size());
    if (!owner->config->setRuntimeCache(*owner->cache)) owner->cache.reset();
  }
  MadeContext made;
  made.owner = owner;
  made.context.reset(engine.createExecutionContext(owner->config.get()));
  made.compiled = [owner] {
    const std::unique_ptr<nvinfer1::IHostMemory> memory(owner->cache ? owner->cache->serialize() : nullptr);
    return memory ? std::string(static_cast<const char*>(memory->data()), memory->size()) : std::string();
  };
  return made;
}

std::string not_recordable(const nvinfer1::IExecutionContext& context, cudaStream_t stream) {
  return context.isStreamCapturable(stream) ? "" : "TensorRT for RTX says that runs of this graph cannot be recorded";
}

}  // namespace tmd::internal::TMD_TRT
