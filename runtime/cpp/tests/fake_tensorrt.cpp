// Stands in for libnvinfer, and built again with its headers for libtensorrt_rtx, where there is no GPU, so that our
// side can be run. A "plan" names a bundle and a graph, and ONNX Runtime computes it on the CPU. fake_cuda.cpp is the
// device.
//
// What it cannot show: that a real library takes and runs a plan, and how fast. It is stricter where our code promises
// more: a run without scratch memory, or with some that is freed, is an error, and every run leaves NaN in it.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "bundle/reader.hpp"
#include "engines/engine.hpp"
#include "fake_cuda.hpp"

#pragma GCC diagnostic ignored "-Wunused-parameter"
#include "tensorrt_stubs.inc"  // made by tools/make_tensorrt_stubs.py

using namespace tmd::internal;

namespace {

// Which runs cannot be recorded, and what was seen: of these questions a test asks.
struct Seen {
  int deserialized = 0;                // plans
  int kernels = 0;                     // contexts that got kernels from an earlier process
  std::map<const void*, int> scratch;  // where runs had their scratch memory
} seen;

bool is_capturable() { return std::getenv("FAKE_TENSORRT_NOT_CAPTURABLE") == nullptr; }

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
  // As much as its inputs, and a bit.
  std::size_t updateDeviceMemorySizeForShapes() noexcept override {
    std::size_t bytes = 256;
    for (const TensorSpec& spec : model_->info.inputs) bytes += bytes_of(spec.dtype, spec.resolve(dims_));
    return bytes;
  }
  void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept override {
    scratch_ = memory;
    scratch_size_ = static_cast<std::size_t>(size);
  }
  bool setTensorAddress(char const* name, void* address) noexcept override {
    const TensorSpec* spec = find_spec(model_->info, name);
    if (!spec || !fake_cuda_is_on_device(address, bytes_of(spec->dtype, spec->resolve(dims_)))) return false;
    addresses_[name] = address;
    return true;
  }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    if (!step_) bind();
    if (addresses_.size() != inputs_.size() + outputs_.size()) return false;
    if (scratch_size_ < updateDeviceMemorySizeForShapes() || (stream->recording && !is_capturable())) return false;
    // What was asked for keeps the addresses of its time, as the launch of a kernel does.
    const auto work = [this, addresses = addresses_, scratch = scratch_, size = scratch_size_] {
      if (!fake_cuda_is_on_device(scratch, size)) std::abort();
      std::memset(scratch, 0xFF, size);
      ++seen.scratch[scratch];
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
  void* scratch_ = nullptr;
  std::size_t scratch_size_ = 0;
  Buffers inputs_, outputs_;
#ifdef TRT_MAJOR_RTX
 public:
  bool isStreamCapturable(cudaStream_t) const noexcept override { return is_capturable(); }

 private:
#endif
  std::unique_ptr<Step> step_;
};

class FakeContext : public nvinfer1::IExecutionContext {
 public:
  explicit FakeContext(std::shared_ptr<Model> model) : made_(std::move(model)) { mImpl = &made_; }

 private:
  ContextImpl made_;
};

#ifdef TRT_MAJOR_RTX
constexpr const char* kKernels = "kernels of the fake";

class MemoryImpl : public nvinfer1::StubMemory {
 public:
  void* data() const noexcept override { return const_cast<char*>(kKernels); }
  std::size_t size() const noexcept override { return std::strlen(kKernels); }
};

class CacheImpl : public nvinfer1::StubCache {
 public:
  nvinfer1::IHostMemory* serialize() const noexcept override { return made<nvinfer1::IHostMemory, MemoryImpl>(); }
  bool deserialize(void const* data, std::size_t size) noexcept override {
    const bool taken = std::string(static_cast<const char*>(data), size) == kKernels;
    seen.kernels += taken;
    return taken;
  }

  // An object of the interface with its implementation.
  template <typename Interface, typename Impl>
  static Interface* made() {
    struct Made : Interface {
      Impl impl;
      Made() { this->mImpl = &impl; }
    };
    return new Made;
  }
};

// Only what the backend asks for is taken, and all of it must be.
class ConfigImpl : public nvinfer1::StubConfig {
 public:
  void setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy it) noexcept override {
    user_managed_ = it == nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
  }
  void setDynamicShapesKernelSpecializationStrategy(
      nvinfer1::DynamicShapesKernelSpecializationStrategy it) noexcept override {
    eager_ = it == nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER;
  }
  bool setCudaGraphStrategy(nvinfer1::CudaGraphStrategy it) noexcept override {
    return it == nvinfer1::CudaGraphStrategy::kDISABLED;
  }
  nvinfer1::IRuntimeCache* createRuntimeCache() const noexcept override {
    return CacheImpl::made<nvinfer1::IRuntimeCache, CacheImpl>();
  }
  bool setRuntimeCache(nvinfer1::IRuntimeCache const&) noexcept override { return has_cache_ = true; }
  // For the engine, which knows what it made.
  nvinfer1::ExecutionContextAllocationStrategy getExecutionContextAllocationStrategy() const noexcept override {
    return user_managed_ && eager_ && has_cache_ ? nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED
                                                 : nvinfer1::ExecutionContextAllocationStrategy::kSTATIC;
  }

 private:
  bool user_managed_ = false, eager_ = false, has_cache_ = false;
};
#endif

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
  nvinfer1::IExecutionContext* createExecutionContext(
      nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override {
    const bool shares = strategy == nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
    return shares ? new FakeContext(model_) : nullptr;
  }
#ifdef TRT_MAJOR_RTX
  nvinfer1::IRuntimeConfig* createRuntimeConfig() noexcept override {
    return CacheImpl::made<nvinfer1::IRuntimeConfig, ConfigImpl>();
  }
  nvinfer1::IExecutionContext* createExecutionContextWithRuntimeConfig(
      nvinfer1::IRuntimeConfig* config) noexcept override {
    return createExecutionContext(config->getExecutionContextAllocationStrategy());
  }
#endif

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
#ifdef TRT_MAJOR_RTX
  nvinfer1::EngineValidity getEngineValidity(void const* data, std::int64_t size,
                                             std::uint64_t* diagnostics) const noexcept override {
    using Diagnostics = nvinfer1::EngineInvalidityDiagnostics;
    const std::string text(static_cast<const char*>(data), static_cast<std::size_t>(size));
    *diagnostics = 0;
    if (text != "for another card") return nvinfer1::EngineValidity::kVALID;
    *diagnostics = static_cast<std::uint64_t>(Diagnostics::kUNSUPPORTED_CC) |
                   static_cast<std::uint64_t>(Diagnostics::kOLD_CUDA_DRIVER);
    return nvinfer1::EngineValidity::kINVALID;
  }
#endif
  // "BUNDLE\nGRAPH"
  nvinfer1::ICudaEngine* deserializeCudaEngine(void const* data, std::size_t size) noexcept override {
    const std::string text(static_cast<const char*>(data), size);
    const std::size_t line = text.find('\n');
    if (line == std::string::npos) {
      log_->log(nvinfer1::ILogger::Severity::kERROR, "magic tag does not match");
      return nullptr;
    }
    ++seen.deserialized;
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

int fake_tensorrt_deserialized() { return seen.deserialized; }
int fake_tensorrt_kernels() { return seen.kernels; }
int fake_tensorrt_scratches() { return static_cast<int>(seen.scratch.size()); }

void* createInferRuntime_INTERNAL(void* log, std::int32_t) noexcept {
  return static_cast<nvinfer1::IRuntime*>(new FakeRuntime(static_cast<nvinfer1::ILogger*>(log)));
}
std::int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
std::int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }
std::int32_t getInferLibPatchVersion() noexcept { return NV_TENSORRT_PATCH; }
std::int32_t getInferLibBuildVersion() noexcept { return NV_TENSORRT_BUILD; }

}  // extern "C"
#pragma GCC visibility pop
