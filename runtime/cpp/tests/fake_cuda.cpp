// Stands in for libcudart where there is no GPU: memory apart from the host's, copies, streams, recording.
//
// It is stricter than CUDA where our code promises more: while a stream records nothing is copied, and fresh memory is
// NaN.
#include "fake_cuda.hpp"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

struct CUgraph_st {
  Work work;
};
struct CUgraphExec_st {
  Work work;
};

namespace {

std::mutex mutex;
std::map<const char*, std::size_t> allocated;  // device memory: address, size
std::atomic<int> launches{0};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

bool fake_cuda_is_on_device(const void* address, std::size_t size) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = allocated.find(static_cast<const char*>(address));
  return found != allocated.end() && size <= found->second;
}

int fake_cuda_launches() { return launches; }

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error of the fake"; }
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "Fake GPU");
  // A card that both libraries are for, unless a test wants another one.
  const char* wanted = std::getenv("FAKE_CUDA_CAPABILITY");
  if (std::sscanf(wanted ? wanted : "12.0", "%d.%d", &properties->major, &properties->minor) != 2) std::abort();
  properties->totalGlobalMem = std::size_t{1} << 34;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return stream->recording ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream->recording = true;
  stream->recorded.clear();
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  stream->recording = false;
  *graph = new CUgraph_st{std::move(stream->recorded)};
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** address, std::size_t size) {
  const char* most = std::getenv("FAKE_CUDA_LARGEST");
  if (most && size > std::strtoull(most, nullptr, 10)) return cudaErrorMemoryAllocation;
  *address = std::aligned_alloc(256, (size + 255) / 256 * 256);
  if (!*address) return cudaErrorMemoryAllocation;
  std::memset(*address, 0xFF, size);  // NaN as float
  const std::lock_guard<std::mutex> lock(mutex);
  allocated[static_cast<char*>(*address)] = size;
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!allocated.erase(static_cast<char*>(address))) return cudaErrorInvalidValue;
  std::free(address);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** address, std::size_t size) {
  *address = std::malloc(size);
  return *address ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void* address) {
  std::free(address);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind == cudaMemcpyDeviceToDevice) {
    if (!fake_cuda_is_on_device(to, size) || !fake_cuda_is_on_device(from, size)) return cudaErrorInvalidValue;
    const auto work = [=] { std::memcpy(to, from, size); };
    if (stream->recording)
      stream->recorded.emplace_back(work);
    else
      work();
    return cudaSuccess;
  }
  if (stream->recording) return cudaErrorStreamCaptureUnsupported;
  if (!fake_cuda_is_on_device(kind == cudaMemcpyHostToDevice ? to : from, size)) return cudaErrorInvalidValue;
  if (fake_cuda_is_on_device(kind == cudaMemcpyHostToDevice ? from : to, 0)) return cudaErrorInvalidMemcpyDirection;
  std::memcpy(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* launch, cudaGraph_t graph, unsigned long long) {
  *launch = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t launch, cudaStream_t stream) {
  if (stream->recording) return cudaErrorStreamCaptureUnsupported;
  for (const auto& each : launch->work) each();
  ++launches;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t launch) {
  delete launch;
  return cudaSuccess;
}

}  // extern "C"
#pragma GCC visibility pop
