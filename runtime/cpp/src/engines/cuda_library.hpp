// The CUDA runtime, found at run time: this library links and starts without it. NVIDIA's own header declares the
// functions, so that a changed signature is an error of the compiler. What both TensorRTs need of a GPU is here: its
// memory, its stream, recordings of it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "engines/buffer.hpp"
#include "engines/compute_capability.hpp"
#include "engines/engine.hpp"

namespace tmd::internal {

// Every function that is used; X(name) per line. CUDA's headers give some names a version by a macro: X must expand
// them before it makes a string of them.
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

struct Cuda;

// Memory that plans need while they run: one piece for the process, as large as the largest plan in use asks for.
// Graphs of a run follow one another on one stream, so that they can share it. All under the mutex of `Cuda`.
class Scratch {
 public:
  explicit Scratch(Cuda& cuda) : cuda_(cuda) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // One more plan uses it, which needs `size` bytes. Nothing may be running. Throws Error(ENGINE) without the memory.
  void join(std::uint64_t size);
  void leave() noexcept;  // the last one frees it

  void* address() const { return address_; }
  std::uint64_t size() const { return size_; }
  // How often the piece was replaced: what was recorded with an earlier one is void.
  std::uint64_t moves() const { return moves_; }

 private:
  void free() noexcept;

  Cuda& cuda_;
  void* address_ = nullptr;
  std::uint64_t size_ = 0, moves_ = 0, users_ = 0;
};

// The library, loaded, with one stream on device 0; shared by everything that was opened with it. Everything runs in
// the order in which it was asked for, and who asks holds `mutex`: clones take turns.
struct Cuda {
#define TMD_MEMBER(name) decltype(&::name) name = nullptr;
  TMD_CUDA_FUNCTIONS(TMD_MEMBER)
#undef TMD_MEMBER

  std::string device;  // "NVIDIA H200"
  Capability capability{};
  std::uint64_t memory = 0;  // of the device, bytes
  cudaStream_t stream = nullptr;
  std::recursive_mutex mutex;
  bool recording = false;  // then nothing runs
  Scratch scratch{*this};

  // Searched beside this library, then by the system's loader. Throws Error(ENGINE) that says what is missing, or that
  // there is no GPU.
  static std::shared_ptr<Cuda> open();
  Cuda() = default;
  Cuda(const Cuda&) = delete;
  Cuda& operator=(const Cuda&) = delete;
  ~Cuda();

  void check(cudaError_t error, const char* what) const;  // throws Error(ENGINE) unless `error` is none
  void wait() const;                                      // until the stream is empty; at once while it records
};

using CudaLock = std::lock_guard<std::recursive_mutex>;

// A buffer in the memory of the GPU; the host's copy is page-locked.
Buffer cuda_buffer(std::shared_ptr<Cuda> cuda, DType dtype, Shape shape);

// What `work` asks of the stream, recorded, and launched whole; valid as long as the scratch memory stays where it is.
// Throws Error(ENGINE).
std::unique_ptr<Step> record_cuda_graph(std::shared_ptr<Cuda> cuda, const std::function<void()>& work);

}  // namespace tmd::internal
