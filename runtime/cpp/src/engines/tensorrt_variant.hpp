// What differs between TensorRT and TensorRT for RTX, and nothing else asks which it is: the twin of
// tmd_engines.tensorrt.library. Implemented twice, by tensorrt_server.cpp and by tensorrt_rtx.cpp.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "engines/cuda_library.hpp"
#include "engines/engine_library.hpp"
#include "engines/plan_key.hpp"

namespace tmd::internal::TMD_TRT {

extern const char* const kEngine;  // its name: "tensorrt-rtx"
extern const char* const kTitle;   // what people call it: "TensorRT for RTX"

LibraryNames library_names();

// Why "auto" should take another engine on this GPU; "": it need not.
std::string not_by_itself(const Cuda& cuda);

// Why a graph of this precision does not run on this GPU; "": it does.
std::string refusal(const std::string& precision, Capability gpu);

// What the key of a plan says of the GPU: its name and compute capability, or what stands for many.
PlanTarget target_of(const std::string& version, const Cuda& cuda);

// Bytes of the weights that are on the GPU together with those of this graph: at worst.
std::uint64_t weights_beside(const Manifest& manifest, const std::string& graph);

// Why a plan cannot run on this GPU, as far as the library tells before it loads it; "": no reason.
std::string refusal_of_plan(const nvinfer1::IRuntime& runtime, std::string_view plan);

// An execution context without scratch memory of its own; null if there is no memory for it. `kernels` are what an
// earlier process compiled for it, and `compiled` gives what to keep once it has run ("": nothing).
struct MadeContext {
  std::shared_ptr<void> owner;  // what the context was made with, and must outlive it
  std::unique_ptr<nvinfer1::IExecutionContext> context;
  std::function<std::string()> compiled;
};
MadeContext make_context(nvinfer1::ICudaEngine& engine, std::string_view kernels);

// Why runs of this context cannot be recorded as a CUDA graph; "": they can.
std::string not_recordable(const nvinfer1::IExecutionContext& context, cudaStream_t stream);

}  // namespace tmd::internal::TMD_TRT
