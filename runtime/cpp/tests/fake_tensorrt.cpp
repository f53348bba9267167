// Stands in for libnvinfer and libcudart where there is no GPU, so that our side of both can be run: buffers apart from
// the host's, copies, streams, recording. A "plan" names a bundle and a graph, and ONNX Runtime computes it on the CPU.
//
// What it cannot show: that a real TensorRT takes and runs a plan, and how fast. It is stricter than CUDA where our
// code promises more: while a stream records nothing is copied, and fresh memory is NaN.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "bundle/reader.hpp"
#include "engines/engine.hpp"

#pragma GCC diagnostic ignored "-Wunused-parameter"
#include "tensorrt_stubs.inc"  // made by tools/make_tensorrt_stubs.py

using namespace tmd::internal;
using Work = std::vector<std::function<void()>>;

struct CUstream_st {
  bool recording = false;
  Work recorded;
};
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

bool on_device(const void* address, std::size_t size) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = allocated.find(static_cast<const char*>(address));
  return found != allocated.end() && size <= found->second;
}

const TensorSpec* find_spec(const GraphInfo& info, const std::string& name, bool* is_input = nullptr) {
  for (const auto* tensors : {&info.inputs, &info.outputs})
    for (const TensorSpec& spec : *tensors)
      if (spec.name == name) {
        if (is_input) *is_input = tensors == &info.inputs;
        return &spec;
      }
  return nullptr;
}

nvinfer1::DataType type_of(DType dtype) {
  static const std::map<DType, nvinfer1::DataType> types = {
      {DType::f32, nvinfer1::DataType::kFLOAT},   {DType::f16, nvinfer1::DataType::kHALF},
      {DType::bf16, nvinfer1::DataType::kBF16},   {DType::i64, nvinfer1::DataType::kINT64},
      {DType::i32, nvinfer1::DataType::kINT32},   {DType::u8, nvinfer1::DataType::kUINT8},
      {DType::boolean, nvinfer1::DataType::kBOOL}};
  return types.at(dtype);
}

struct Model {
  Bundle bundle;
  GraphInfo info;
  std::shared_ptr<LoadedGraph> graph;
};

class ContextImpl : public nvinfer1::StubContext {
 public:
  explicit ContextImpl(std::shared_ptr<Model> model) : model_(std::move(model)) {}

  bool setInputShape(char const* name, nvinfer1::Dims const& shape) noexcept override {
    bool is_input = false;
    const TensorSpec* spec = find_spec(model_->info, name, &is_input);
    if (!spec || !is_input || shape.nbDims != static_cast<int>(spec->shape.size())) return false;
    for (std::size_t i = 0; i < spec->shape.size(); ++i)
      if (!spec->shape[i].symbol.empty()) dims_[spec->shape[i].symbol] = shape.d[i] / spec->shape[i].factor;
    return true;
  }
  nvinfer1::Dims getTensorShape(char const* name) const noexcept override {
    nvinfer1::Dims shape{};
    const std::vector<std::int64_t> sizes = find_spec(model_->info, name)->resolve(dims_);
    shape.nbDims = static_cast<int>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), shape.d);
    return shape;
  }
  bool setTensorAddress(char const* name, void* address) noexcept override {
    const TensorSpec* spec = find_spec(model_->info, name);
    if (!spec || !on_device(address, bytes_of(spec->dtype, spec->resolve(dims_)))) return false;
    addresses_[name] = address;
    return true;
  }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    if (!step_) bind();
    if (addresses_.size() != inputs_.size() + outputs_.size()) return false;
    // What was asked for keeps the addresses of its time, as the launch of a kernel does.
    const auto work = [this, addresses = addresses_] {
      for (const auto& [name, buffer] : inputs_) std::memcpy(buffer.address(), addresses.at(name), buffer.bytes());
      step_->run();
      for (const auto& [name, buffer] : outputs_) std::memcpy(addresses.at(name), buffer.address(), buffer.bytes());
    };
    if (stream->recording)
      stream->recorded.emplace_back(work);
    else
      work();
    return true;
  }

 private:
  void bind() {
    for (const TensorSpec& spec : model_->info.inputs) inputs_[spec.name] = Buffer(spec.dtype, spec.resolve(dims_));
    for (const TensorSpec& spec : model_->info.outputs) outputs_[spec.name] = Buffer(spec.dtype, spec.resolve(dims_));
    step_ = model_->graph->bind(inputs_, outputs_);
  }

  std::shared_ptr<Model> model_;
  Dims dims_;
  std::map<std::string, void*> addresses_;
  Buffers inputs_, outputs_;
  std::unique_ptr<Step> step_;
};

class FakeContext : public nvinfer1::IExecutionContext {
 public:
  explicit FakeContext(std::shared_ptr<Model> model) : made_(std::move(model)) { mImpl = &made_; }

 private:
  ContextImpl made_;
};

class EngineImpl : public nvinfer1::StubEngine {
 public:
  explicit EngineImpl(std::shared_ptr<Model> model) : model_(std::move(model)) {}

  std::int64_t getStreamableWeightsSize() const noexcept override { return 0; }
  nvinfer1::TensorIOMode getTensorIOMode(char const* name) const noexcept override {
    bool is_input = false;
    if (!find_spec(model_->info, name, &is_input)) return nvinfer1::TensorIOMode::kNONE;
    return is_input ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
  }
  nvinfer1::DataType getTensorDataType(char const* name) const noexcept override {
    return type_of(find_spec(model_->info, name)->dtype);
  }
  nvinfer1::IExecutionContext* createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy) noexcept override {
    return new FakeContext(model_);
  }

 private:
  std::shared_ptr<Model> model_;
};

class FakeEngine : public nvinfer1::ICudaEngine {
 public:
  explicit FakeEngine(std::shared_ptr<Model> model) : made_(std::move(model)) { mImpl = &made_; }

 private:
  EngineImpl made_;
};

class RuntimeImpl : public nvinfer1::StubRuntime {
 public:
  explicit RuntimeImpl(nvinfer1::ILogger* log) : log_(log) {}

  void setEngineHostCodeAllowed(bool allowed) noexcept override {
    if (allowed) std::abort();
  }
  // "BUNDLE\nGRAPH"
  nvinfer1::ICudaEngine* deserializeCudaEngine(void const* data, std::size_t size) noexcept override {
    const std::string text(static_cast<const char*>(data), size);
    const std::size_t line = text.find('\n');
    if (line == std::string::npos) {
      log_->log(nvinfer1::ILogger::Severity::kERROR, "magic tag does not match");
      return nullptr;
    }
    auto model = std::make_shared<Model>();
    model->bundle = Bundle::open(text.substr(0, line));
    model->info = model->bundle.graph(text.substr(line + 1), "be run");
    EngineOptions options;
    options.engine = "onnxruntime";
    options.threads = 1;
    model->graph = open_engine(options)->load(model->bundle, model->info);
    return new FakeEngine(std::move(model));
  }

 private:
  nvinfer1::ILogger* log_;
};

class FakeRuntime : public nvinfer1::IRuntime {
 public:
  explicit FakeRuntime(nvinfer1::ILogger* log) : made_(log) { mImpl = &made_; }

 private:
  RuntimeImpl made_;
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int fake_tensorrt_launches() { return launches; }

void* createInferRuntime_INTERNAL(void* log, std::int32_t) noexcept {
  return static_cast<nvinfer1::IRuntime*>(new FakeRuntime(static_cast<nvinfer1::ILogger*>(log)));
}
std::int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
std::int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }
std::int32_t getInferLibPatchVersion() noexcept { return NV_TENSORRT_PATCH; }
std::int32_t getInferLibBuildVersion() noexcept { return NV_TENSORRT_BUILD; }

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error of the fake"; }
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "Fake GPU");
  properties->major = 9;
  properties->minor = 0;
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
    if (!on_device(to, size) || !on_device(from, size)) return cudaErrorInvalidValue;
    const auto work = [=] { std::memcpy(to, from, size); };
    if (stream->recording)
      stream->recorded.emplace_back(work);
    else
      work();
    return cudaSuccess;
  }
  if (stream->recording) return cudaErrorStreamCaptureUnsupported;
  if (!on_device(kind == cudaMemcpyHostToDevice ? to : from, size)) return cudaErrorInvalidValue;
  if (on_device(kind == cudaMemcpyHostToDevice ? from : to, 0)) return cudaErrorInvalidMemcpyDirection;
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
