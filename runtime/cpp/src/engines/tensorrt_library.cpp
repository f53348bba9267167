#include "engines/tensorrt_library.hpp"

#include <dlfcn.h>

#include <map>

#include "base/error.hpp"
#include "engines/engine_library.hpp"

namespace tmd::internal {
namespace {

LibraryNames nvinfer() {
  return {"TensorRT", {"libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR), "libnvinfer.so"}, ""};
}

LibraryNames cudart() {
  return {"The CUDA runtime", {"libcudart.so." + std::to_string(CUDART_VERSION / 1000), "libcudart.so"}, ""};
}

void* symbol(void* handle, const char* engine, const char* name) {
  void* found = ::dlsym(handle, name);
  if (!found) fail_engine(std::string("this ") + engine + " has no function " + name + ": install another version.");
  return found;
}

// Objects of TensorRT are called through tables that only grow within a major version: the library may be newer than
// the headers, and not older. What is passed to CUDA has the layout of one major version.
void check_versions(const TensorRt& library) {
  const int major = library.getInferLibMajorVersion(), minor = library.getInferLibMinorVersion();
  if (major != NV_TENSORRT_MAJOR || minor < NV_TENSORRT_MINOR)
    fail_engine("this library was built with the headers of TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + "." +
                std::to_string(NV_TENSORRT_MINOR) + ", and TensorRT " + library.version +
                " is installed: install that or a later " + std::to_string(NV_TENSORRT_MAJOR) +
                ".x, or build with other headers.");
  int cuda = 0;
  library.check(library.cudaRuntimeGetVersion(&cuda), "cannot tell its version");
  if (cuda / 1000 != CUDART_VERSION / 1000)
    fail_engine("this library was built with the headers of CUDA " + std::to_string(CUDART_VERSION / 1000) +
                ", and the CUDA runtime is of " + std::to_string(cuda / 1000) + ": install the one, or build again.");
}

class CudaMemory : public DeviceMemory {
 public:
  CudaMemory(std::shared_ptr<TensorRt> library, std::size_t bytes) : library_(std::move(library)), bytes_(bytes) {
    if (library_->cudaMalloc(&address_, bytes ? bytes : 1) != cudaSuccess)
      fail_engine("the GPU has no memory left for a buffer of " + std::to_string(bytes) +
                  " bytes: choose fewer frames or a smaller size.");
  }
  CudaMemory(const CudaMemory&) = delete;
  CudaMemory& operator=(const CudaMemory&) = delete;
  ~CudaMemory() override {
    library_->cudaFree(address_);
    if (host_) library_->cudaFreeHost(host_);
  }

  void* address() const override { return address_; }
  void* host() override {
    if (!host_ && library_->cudaMallocHost(&host_, bytes_ ? bytes_ : 1) != cudaSuccess) throw std::bad_alloc();
    return host_;
  }
  void upload() override { copy(address_, host(), cudaMemcpyHostToDevice); }
  void download() override { copy(host(), address_, cudaMemcpyDeviceToHost); }
  void copy(const DeviceMemory& from) override { copy(address_, from.address(), cudaMemcpyDeviceToDevice); }

 private:
  void copy(void* to, const void* from, cudaMemcpyKind kind) const {
    const std::lock_guard<std::recursive_mutex> lock(library_->mutex);
    library_->check(library_->cudaMemcpyAsync(to, from, bytes_, kind, library_->stream), "cannot copy");
    library_->wait();
  }

  std::shared_ptr<TensorRt> library_;
  std::size_t bytes_;
  void *address_ = nullptr, *host_ = nullptr;
};

}  // namespace

std::shared_ptr<TensorRt> TensorRt::open(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, std::weak_ptr<TensorRt>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (std::shared_ptr<TensorRt> found = known[path].lock()) return found;

  auto library = std::make_shared<TensorRt>();
  void* handle = open_engine_library(cudart(), "");
  const char* engine = "CUDA runtime";
#define TMD_FIND(name) TMD_FIND_EXPANDED(name)
#define TMD_FIND_EXPANDED(name) \
  library->name = reinterpret_cast<decltype(library->name)>(symbol(handle, engine, #name));
  TMD_CUDA_FUNCTIONS(TMD_FIND)
  handle = open_engine_library(nvinfer(), path);
  engine = "TensorRT";
  TMD_TENSORRT_FUNCTIONS(TMD_FIND)
#undef TMD_FIND
#undef TMD_FIND_EXPANDED

  library->version = std::to_string(library->getInferLibMajorVersion()) + "." +
                     std::to_string(library->getInferLibMinorVersion()) + "." +
                     std::to_string(library->getInferLibPatchVersion()) + "." +
                     std::to_string(library->getInferLibBuildVersion());
  check_versions(*library);
  library->check(library->cudaSetDevice(0), "finds no GPU");
  cudaDeviceProp properties{};
  library->check(library->cudaGetDeviceProperties(&properties, 0), "cannot describe the GPU");
  library->device = properties.name;
  library->major = properties.major;
  library->minor = properties.minor;
  library->memory = properties.totalGlobalMem;
  library->check(library->cudaStreamCreateWithFlags(&library->stream, cudaStreamNonBlocking), "cannot start");
  known[path] = library;
  return library;
}

TensorRt::~TensorRt() {
  if (stream) cudaStreamDestroy(stream);
}

void TensorRt::check(cudaError_t error, const char* what) const {
  if (error == cudaSuccess) return;
  const char* reason = cudaGetErrorString(error);
  fail_engine(std::string("CUDA ") + what + ": " + (reason ? reason : "it gave no reason") +
              ". nvidia-smi shows GPU and driver.");
}

void TensorRt::wait() const {
  if (!recording) check(cudaStreamSynchronize(stream), "failed");
}

Buffer cuda_buffer(std::shared_ptr<TensorRt> library, DType dtype, Shape shape) {
  auto memory = std::make_shared<CudaMemory>(std::move(library), bytes_of(dtype, shape));
  return Buffer(dtype, std::move(shape), std::move(memory));
}

}  // namespace tmd::internal
