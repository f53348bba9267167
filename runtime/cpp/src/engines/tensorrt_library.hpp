// TensorRT and the CUDA runtime, found at run time: this library links and starts without both. NVIDIA's own headers
// declare the functions, so that a changed signature is an error of the compiler.
//
// Compiled against headers of TensorRT 10.3, 10.16 and 11.1; never run on a GPU.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "engines/buffer.hpp"

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3)
#error "TensorRT 10.3 or newer is needed: name its headers in TMD_TENSORRT_INCLUDE, or set TMD_TENSORRT to OFF"
#endif

namespace tmd::internal {

// Every function that is used; X(name) per line. CUDA's headers give some names a version by a macro: X must expand
// them before it makes a string of them.
#define TMD_TENSORRT_FUNCTIONS(X) \
  X(createInferRuntime_INTERNAL)  \
  X(getInferLibMajorVersion)      \
  X(getInferLibMinorVersion)      \
  X(getInferLibPatchVersion)      \
  X(getInferLibBuildVersion)
#define TMD_CUDA_FUNCTIONS(X)      \
  X(cudaGetErrorString)            \
  X(cudaRuntimeGetVersion)         \
  X(cudaSetDevice)                 \
  X(cudaGetDeviceProperties)       \
  X(cudaStreamCreateWithFlags)     \
  X(cudaStreamDestroy)             \
  X(cudaStreamSynchronize)         \
  X(cudaStreamBeginCapture)        \
  X(cudaStreamEndCapture)          \
  X(cudaMalloc)                    \
  X(cudaFree)                      \
  X(cudaMallocHost)                \
  X(cudaFreeHost)                  \
  X(cudaMemcpyAsync)               \
  X(cudaGraphInstantiateWithFlags) \
  X(cudaGraphDestroy)              \
  X(cudaGraphLaunch)               \
  X(cudaGraphExecDestroy)

// Both libraries, loaded, with one stream on device 0; shared by everything that was opened with them. Everything runs
// in the order in which it was asked for, and who asks holds `mutex`: clones take turns.
struct TensorRt {
#define TMD_MEMBER(name) decltype(&::name) name = nullptr;
  TMD_TENSORRT_FUNCTIONS(TMD_MEMBER)
  TMD_CUDA_FUNCTIONS(TMD_MEMBER)
#undef TMD_MEMBER

  std::string version;       // "10.16.1.11"
  std::string device;        // "NVIDIA H200"
  int major = 0, minor = 0;  // compute capability
  std::uint64_t memory = 0;  // of the device, bytes
  cudaStream_t stream = nullptr;
  std::recursive_mutex mutex;
  bool recording = false;  // then nothing runs

  // `path` is libnvinfer's; empty: beside this library, then the system's loader. The CUDA runtime is always searched
  // so. Throws Error(ENGINE) that says what is missing, or that there is no GPU.
  static std::shared_ptr<TensorRt> open(const std::string& path);
  TensorRt() = default;
  TensorRt(const TensorRt&) = delete;
  TensorRt& operator=(const TensorRt&) = delete;
  ~TensorRt();

  void check(cudaError_t error, const char* what) const;  // throws Error(ENGINE) unless `error` is none
  void wait() const;                                      // until the stream is empty; at once while it records
};

// A buffer in the memory of the GPU; the host's copy is page-locked.
Buffer cuda_buffer(std::shared_ptr<TensorRt> library, DType dtype, Shape shape);

}  // namespace tmd::internal
