// TensorRT, for cards of servers and Jetson.
#include "engines/tensorrt_variant.hpp"

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3)
#error "TensorRT 10.3 or newer is needed: name its headers in TMD_TENSORRT_INCLUDE, or set TMD_TENSORRT to OFF"
#endif

namespace tmd::internal::TMD_TRT {

const char* const kEngine = "tensorrt";
const char* const kTitle = "TensorRT";

LibraryNames library_names() {
  return {kTitle, {"libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR), "libnvinfer.so"}, ""};
}

std::string not_by_itself(const Cuda&) { return ""; }

std::string refusal(const std::string& precision, Capability gpu) {
  const Capability since = precision == "fp8" ? Capability{8, 9} : precision == "nvfp4" ? Capability{10, 0} : Capability{};
  return gpu < since ? refusal_on(precision, gpu) : "";
}

PlanTarget target_of(const std::string& version, const Cuda& cuda) {
  return {kEngine, version, cuda.device, to_text(cuda.capability), false};
}

std::uint64_t weights_beside(const Manifest& manifest, const std::string&) {
  std::uint64_t bytes = 0;
  for (const auto& [name, graph] : manifest.graphs) bytes += stored_bytes(manifest, graph);
  return bytes;
}

std::string refusal_of_plan(const nvinfer1::IRuntime&, std::string_view) { return ""; }

MadeContext make_context(nvinfer1::ICudaEngine& engine, std::string_view) {
  MadeContext made;
  made.context.reset(engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
  made.compiled = [] { return std::string(); };
  return made;
}

std::string not_recordable(const nvinfer1::IExecutionContext&, cudaStream_t) { return ""; }

}  // namespace tmd::internal::TMD_TRT
