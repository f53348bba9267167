#include "engines/cuda_library.hpp"

#include <algorithm>
#include <exception>

#include "base/error.hpp"
#include "base/stopping.hpp"
#include "engines/engine_library.hpp"

namespace tmd::internal {
namespace {

LibraryNames cudart() {
  return {"The CUDA runtime", {"libcudart.so." + std::to_string(CUDART_VERSION / 1000), "libcudart.so"}, ""};
}

// What is passed to CUDA has the layout of one major version.
void check_version(const Cuda& cuda) {
  int version = 0;
  cuda.check(cuda.cudaRuntimeGetVersion(&version), "cannot tell its version");
  if (version / 1000 != CUDART_VERSION / 1000)
    fail_engine("this library was built with the headers of CUDA " + std::to_string(CUDART_VERSION / 1000) +
                ", and the CUDA runtime is of " + std::to_string(version / 1000) +
                ": install the one, or build again.");
}

class CudaMemory : public DeviceMemory {
 public:
  CudaMemory(std::shared_ptr<Cuda> cuda, std::size_t bytes) : cuda_(std::move(cuda)), bytes_(bytes) {
    if (cuda_->cudaMalloc(&address_, bytes ? bytes : 1) != cudaSuccess)
      fail_engine("the GPU has no memory left for a buffer of " + std::to_string(bytes) +
                  " bytes: choose fewer frames or a smaller size.");
  }
  CudaMemory(const CudaMemory&) = delete;
  CudaMemory& operator=(const CudaMemory&) = delete;
  ~CudaMemory() override {
    cuda_->cudaFree(address_);
    if (host_) cuda_->cudaFreeHost(host_);
  }

  void* address() const override { return address_; }
  void* host() override {
    if (!host_ && cuda_->cudaMallocHost(&host_, bytes_ ? bytes_ : 1) != cudaSuccess) throw std::bad_alloc();
    return host_;
  }
  void upload() override { copy(address_, host(), cudaMemcpyHostToDevice); }
  void download() override { copy(host(), address_, cudaMemcpyDeviceToHost); }
  void copy(const DeviceMemory& from) override { copy(address_, from.address(), cudaMemcpyDeviceToDevice); }

 private:
  void copy(void* to, const void* from, cudaMemcpyKind kind) const {
    const CudaLock lock(cuda_->mutex);
    cuda_->check(cuda_->cudaMemcpyAsync(to, from, bytes_, kind, cuda_->stream), "cannot copy");
    cuda_->wait();
  }

  std::shared_ptr<Cuda> cuda_;
  std::size_t bytes_;
  void *address_ = nullptr, *host_ = nullptr;
};

class CudaGraph : public Step {
 public:
  CudaGraph(std::shared_ptr<Cuda> cuda, const std::function<void()>& work) : cuda_(std::move(cuda)) {
    const CudaLock lock(cuda_->mutex);
    moves_ = cuda_->scratch.moves();
    cudaGraph_t graph = nullptr;
    cuda_->check(cuda_->cudaStreamBeginCapture(cuda_->stream, cudaStreamCaptureModeThreadLocal), "cannot record");
    cuda_->recording = true;
    std::exception_ptr failure;
    try {
      work();
    } catch (...) {
      failure = std::current_exception();
    }
    cuda_->recording = false;
    const cudaError_t ended = cuda_->cudaStreamEndCapture(cuda_->stream, &graph);
    const std::unique_ptr<CUgraph_st, cudaError_t (*)(cudaGraph_t)> owner(graph, cuda_->cudaGraphDestroy);
    if (failure) std::rethrow_exception(failure);
    cuda_->check(ended, "cannot record");
    cuda_->check(cuda_->cudaGraphInstantiateWithFlags(&launch_, graph, 0), "cannot keep what it recorded");
  }
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;
  ~CudaGraph() override {
    if (launch_) cuda_->cudaGraphExecDestroy(launch_);
  }

  void run() override {
    if (!run_if_valid()) fail_engine("the GPU's memory has moved since this was recorded: record it again.");
  }
  bool run_if_valid() override {
    check_stopped();
    const CudaLock lock(cuda_->mutex);
    if (moves_ != cuda_->scratch.moves()) return false;
    cuda_->check(cuda_->cudaGraphLaunch(launch_, cuda_->stream), "cannot launch a graph");
    cuda_->wait();
    return true;
  }

 private:
  std::shared_ptr<Cuda> cuda_;
  std::uint64_t moves_ = 0;
  cudaGraphExec_t launch_ = nullptr;
};

}  // namespace

void Scratch::join(std::uint64_t size) {
  const CudaLock lock(cuda_.mutex);
  if (!address_ || size > size_) {
    const std::uint64_t before = size_, bytes = std::max<std::uint64_t>(size, 1);
    free();  // two would not fit side by side
    ++moves_;
    const auto allocate = [&](std::uint64_t count) {
      if (cuda_.cudaMalloc(&address_, count) == cudaSuccess) return size_ = count, true;
      return address_ = nullptr, false;
    };
    if (!allocate(bytes)) {
      if (before) allocate(before);  // for those that run in it
      fail_engine("the GPU has no memory left for the " + std::to_string(bytes) +
                  " bytes that a graph needs while it runs: choose fewer frames or a smaller size, or TMD_MEMORY_LOW.");
    }
  }
  ++users_;
}

void Scratch::leave() noexcept {
  const CudaLock lock(cuda_.mutex);
  if (--users_ == 0) free();
}

void Scratch::free() noexcept {
  if (address_) cuda_.cudaFree(address_);
  address_ = nullptr;
  size_ = 0;
}

std::shared_ptr<Cuda> Cuda::open() {
  static std::mutex mutex;
  static std::weak_ptr<Cuda> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (std::shared_ptr<Cuda> found = known.lock()) return found;

  auto cuda = std::make_shared<Cuda>();
  void* handle = open_engine_library(cudart(), "");
#define TMD_FIND(name) TMD_FIND_EXPANDED(name)
#define TMD_FIND_EXPANDED(name) \
  cuda->name = reinterpret_cast<decltype(cuda->name)>(find_symbol(handle, "CUDA runtime", #name));
  TMD_CUDA_FUNCTIONS(TMD_FIND)
#undef TMD_FIND
#undef TMD_FIND_EXPANDED

  check_version(*cuda);
  cuda->check(cuda->cudaSetDevice(0), "finds no GPU");
  cudaDeviceProp properties{};
  cuda->check(cuda->cudaGetDeviceProperties(&properties, 0), "cannot describe the GPU");
  cuda->device = properties.name;
  cuda->capability = {properties.major, properties.minor};
  cuda->memory = properties.totalGlobalMem;
  cuda->check(cuda->cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking), "cannot start");
  known = cuda;
  return cuda;
}

Cuda::~Cuda() {
  if (stream) cudaStreamDestroy(stream);
}

void Cuda::check(cudaError_t error, const char* what) const {
  if (error == cudaSuccess) return;
  const char* reason = cudaGetErrorString(error);
  fail_engine(std::string("CUDA ") + what + ": " + (reason ? reason : "it gave no reason") +
              ". nvidia-smi shows GPU and driver.");
}

void Cuda::wait() const {
  if (!recording) check(cudaStreamSynchronize(stream), "failed");
}

Buffer cuda_buffer(std::shared_ptr<Cuda> cuda, DType dtype, Shape shape) {
  auto memory = std::make_shared<CudaMemory>(std::move(cuda), bytes_of(dtype, shape));
  return Buffer(dtype, std::move(shape), std::move(memory));
}

std::unique_ptr<Step> record_cuda_graph(std::shared_ptr<Cuda> cuda, const std::function<void()>& work) {
  return std::make_unique<CudaGraph>(std::move(cuda), work);
}

}  // namespace tmd::internal
