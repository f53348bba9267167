#include "engines/tensorrt_engine.hpp"

#include <mutex>
#include <vector>

#include "base/quote.hpp"
#include "base/stopping.hpp"
#include "engines/plan_cache.hpp"
#include "engines/tensorrt_library.hpp"

namespace tmd::internal {
namespace {

using Library = std::shared_ptr<TensorRt>;
using Shapes = std::map<std::string, Shape>;
using Lock = std::lock_guard<std::recursive_mutex>;

struct Since {
  const char* precision;
  int capability;  // times 10
  const char *shown, *instead;
};
constexpr Since kSince[] = {{"fp8", 89, "8.9", "fp16 or bf16"}, {"nvfp4", 100, "10.0", "fp8 or bf16"}};
constexpr double kStreamAbove = 0.8;  // of the device's memory; tmd_engines.tensorrt.engine gives the reason

nvinfer1::DataType element_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return nvinfer1::DataType::kFLOAT;
    case DType::f16:
      return nvinfer1::DataType::kHALF;
    case DType::bf16:
      return nvinfer1::DataType::kBF16;
    case DType::i64:
      return nvinfer1::DataType::kINT64;
    case DType::i32:
      return nvinfer1::DataType::kINT32;
    case DType::u8:
      return nvinfer1::DataType::kUINT8;
    case DType::boolean:
      return nvinfer1::DataType::kBOOL;
  }
  return nvinfer1::DataType::kFLOAT;
}

// Keeps the latest error of TensorRT, to say it in ours.
class Log : public nvinfer1::ILogger {
 public:
  void log(Severity severity, nvinfer1::AsciiChar const* text) noexcept override {
    if (severity > Severity::kERROR) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      last_ = text;
    } catch (...) {  // without memory: without its words
    }
  }
  std::string take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::string text = last_.empty() ? "it gave no reason" : quote(last_, 500);
    last_.clear();
    return text;
  }

 private:
  std::mutex mutex_;
  std::string last_;
};

// A plan made executable for its sizes. Host code in a plan is never allowed: that is TensorRT's default, and set once
// more.
class Plan {
 public:
  Plan(const Library& library, const std::string& content, const Shapes& shapes) : library_(library) {
    // As the inline function of the header does it, which would have to be linked.
    runtime_.reset(static_cast<nvinfer1::IRuntime*>(library_->createInferRuntime_INTERNAL(&log_, NV_TENSORRT_VERSION)));
    if (!runtime_) fail("does not start");
    runtime_->setEngineHostCodeAllowed(false);
    engine_.reset(runtime_->deserializeCudaEngine(content.data(), content.size()));
    if (!engine_) fail("refuses the plan");
    // What is left of the memory, as TensorRT sees it; before a context is made, not after.
    if (engine_->getStreamableWeightsSize() > 0 &&
        !engine_->setWeightStreamingBudgetV2(engine_->getWeightStreamingAutomaticBudget()))
      fail("cannot stream the weights of the plan");
    context_.reset(engine_->createExecutionContext());
    if (!context_) fail("has no memory to run the plan");
    for (const auto& [name, shape] : shapes)
      if (!context_->setInputShape(name.c_str(), dims(shape))) fail("refuses the shape of " + name);
  }

  // Throws Error(ENGINE) unless the plan has this tensor, and in the type and shape of the buffer.
  void check_tensor(const std::string& name, const Buffer& buffer, nvinfer1::TensorIOMode mode) {
    const nvinfer1::Dims found = context_->getTensorShape(name.c_str());
    bool same = engine_->getTensorIOMode(name.c_str()) == mode &&
                engine_->getTensorDataType(name.c_str()) == element_type(buffer.dtype()) &&
                found.nbDims == static_cast<int>(buffer.shape().size());
    for (int i = 0; same && i < found.nbDims; ++i) same = found.d[i] == buffer.shape()[static_cast<std::size_t>(i)];
    if (!same)
      fail_engine("the TensorRT plan has another " + name +
                  " than the graph: delete it, and run tmd-engine build again.");
  }

  // Asks for a run on these buffers; the caller holds the library's mutex.
  void enqueue(const Buffers& buffers) {
    for (const auto& [name, buffer] : buffers)
      if (!context_->setTensorAddress(name.c_str(), buffer.address())) fail("refuses the address of " + name);
    if (!context_->enqueueV3(library_->stream)) fail("failed");
  }

 private:
  [[noreturn]] void fail(const std::string& what) {
    fail_engine("TensorRT " + library_->version + " " + what + ": " + log_.take() + ".");
  }

  static nvinfer1::Dims dims(const Shape& shape) {
    nvinfer1::Dims made{};
    made.nbDims = static_cast<int>(shape.size());
    for (std::size_t i = 0; i < shape.size(); ++i) made.d[i] = shape[i];
    return made;
  }

  // In this order: each goes before what made it.
  Library library_;
  Log log_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

class TensorRtStep : public Step {
 public:
  TensorRtStep(Library library, std::shared_ptr<Plan> plan, const Buffers& inputs, const Buffers& outputs)
      : library_(std::move(library)), plan_(std::move(plan)), buffers_(inputs) {
    buffers_.insert(outputs.begin(), outputs.end());
    for (const auto& [name, buffer] : inputs) plan_->check_tensor(name, buffer, nvinfer1::TensorIOMode::kINPUT);
    for (const auto& [name, buffer] : outputs) plan_->check_tensor(name, buffer, nvinfer1::TensorIOMode::kOUTPUT);
  }

  void run() override {
    check_stopped();
    const Lock lock(library_->mutex);
    plan_->enqueue(buffers_);
    library_->wait();
  }

 private:
  Library library_;
  std::shared_ptr<Plan> plan_;
  Buffers buffers_;
};

// What was recorded from the stream, launched whole.
class CudaGraph : public Step {
 public:
  CudaGraph(Library library, const std::function<void()>& work) : library_(std::move(library)) {
    const Lock lock(library_->mutex);
    cudaGraph_t graph = nullptr;
    library_->check(library_->cudaStreamBeginCapture(library_->stream, cudaStreamCaptureModeThreadLocal),
                    "cannot record");
    library_->recording = true;
    std::exception_ptr failure;
    try {
      work();
    } catch (...) {
      failure = std::current_exception();
    }
    library_->recording = false;
    const cudaError_t ended = library_->cudaStreamEndCapture(library_->stream, &graph);
    const std::unique_ptr<CUgraph_st, cudaError_t (*)(cudaGraph_t)> owner(graph, library_->cudaGraphDestroy);
    if (failure) std::rethrow_exception(failure);
    library_->check(ended, "cannot record");
    library_->check(library_->cudaGraphInstantiateWithFlags(&launch_, graph, 0), "cannot keep what it recorded");
  }
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;
  ~CudaGraph() override {
    if (launch_) library_->cudaGraphExecDestroy(launch_);
  }

  void run() override {
    check_stopped();
    const Lock lock(library_->mutex);
    library_->check(library_->cudaGraphLaunch(launch_, library_->stream), "cannot launch a graph");
    library_->wait();
  }

 private:
  Library library_;
  cudaGraphExec_t launch_ = nullptr;
};

// One graph, with a plan per combination of input shapes. The latest plan is kept, and those of older sizes as long as
// a step uses them.
class TensorRtGraph : public LoadedGraph {
 public:
  TensorRtGraph(Library library, const Bundle& bundle, const GraphInfo& info, std::string folder, PlanTarget target)
      : library_(std::move(library)),
        bundle_(bundle),
        info_(info),
        folder_(std::move(folder)),
        target_(std::move(target)) {}

  const GraphInfo& info() const override { return info_; }

  bool records() const override { return true; }
  std::unique_ptr<Step> record(const std::function<void()>& work) override {
    return std::make_unique<CudaGraph>(library_, work);
  }

 private:
  std::unique_ptr<Step> tie(const Buffers& inputs, const Buffers& outputs) override {
    return std::make_unique<TensorRtStep>(library_, plan_for(inputs), inputs, outputs);
  }

  Buffer allocate(DType dtype, Shape shape) const override { return cuda_buffer(library_, dtype, std::move(shape)); }

  std::shared_ptr<Plan> plan_for(const Buffers& inputs) {
    Shapes shapes;
    for (const auto& [name, buffer] : inputs) shapes[name] = buffer.shape();
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto before = known_.find(shapes);
    std::shared_ptr<Plan> plan = before == known_.end() ? nullptr : before->second.lock();
    if (!plan) {
      latest_.reset();  // two plans of a large model do not fit side by side
      const std::string content = find_plan(folder_, plan_key(bundle_, info_, shapes, target_));
      const Lock turn(library_->mutex);
      plan = std::make_shared<Plan>(library_, content, shapes);
      known_[shapes] = plan;
    }
    latest_ = plan;
    return plan;
  }

  Library library_;
  Bundle bundle_;
  GraphInfo info_;
  std::string folder_;
  PlanTarget target_;
  std::mutex mutex_;
  std::map<Shapes, std::weak_ptr<Plan>> known_;
  std::shared_ptr<Plan> latest_;
};

class TensorRtEngine : public Engine {
 public:
  explicit TensorRtEngine(const EngineOptions& options)
      : library_(TensorRt::open(options.library)), folder_(plan_folder(options.plan_cache)) {}

  const char* name() const override { return "tensorrt"; }
  std::string version() const override { return library_->version; }
  bool on_device() const override { return true; }

  std::shared_ptr<LoadedGraph> load(const Bundle& bundle, const GraphInfo& info) override {
    check_graph_types(info);
    const std::string capability = std::to_string(library_->major) + "." + std::to_string(library_->minor);
    for (const auto& [precision, since, shown, instead] : kSince)
      if (info.precision == precision && library_->major * 10 + library_->minor < since)
        fail_engine("the graph " + info.file + " is " + precision + ", which GPUs multiply from compute capability " +
                    shown + " on, and " + library_->device + " has " + capability + ": use a bundle in " + instead + ".");
    std::uint64_t weights = 0;
    for (const auto& [name, graph] : bundle.manifest.graphs)
      for (const std::string& file : {graph.file, graph.data.value_or("")})
        if (!file.empty()) weights += bundle.manifest.files.at(file).size;
    const bool streaming = static_cast<double>(weights) > kStreamAbove * static_cast<double>(library_->memory);
    const PlanTarget target{library_->version, library_->device, capability, streaming};
    return std::make_shared<TensorRtGraph>(library_, bundle, info, folder_, target);
  }

 private:
  Library library_;
  std::string folder_;
};

}  // namespace

std::shared_ptr<Engine> open_tensorrt(const EngineOptions& options) {
  return std::make_shared<TensorRtEngine>(options);
}

}  // namespace tmd::internal
