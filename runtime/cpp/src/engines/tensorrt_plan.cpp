#include "engines/tensorrt_plan.hpp"

#include <algorithm>

#include "base/error.hpp"
#include "base/quote.hpp"

namespace tmd::internal::TMD_TRT {
namespace {

constexpr std::size_t kKeptMessages = 3, kMostOfReason = 600;

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

nvinfer1::Dims dims(const Shape& shape) {
  nvinfer1::Dims made{};
  made.nbDims = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), made.d);
  return made;
}

// One space for every run of them, and for line breaks; whatever the host's locale.
std::string in_one_line(std::string_view text) {
  std::string line;
  for (const char c : text) {
    if (c != ' ' && !(c >= '\t' && c <= '\r')) {
      line += c;
    } else if (!line.empty() && line.back() != ' ') {
      line += ' ';
    }
  }
  return line.substr(0, line.find_last_not_of(' ') + 1);
}

std::string list(const Shape& shape) {
  std::string text;
  for (const std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

}  // namespace

void Log::log(Severity severity, nvinfer1::AsciiChar const* text) noexcept {
  if (severity > Severity::kERROR) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  try {
    errors_.push_back(in_one_line(text));
    if (errors_.size() > kKeptMessages) errors_.erase(errors_.begin());
  } catch (...) {  // without memory: without its words
  }
}

std::string Log::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string text;
  for (const std::string& each : errors_) text += (text.empty() ? "" : "; ") + each;
  errors_.clear();
  text.resize(std::min(text.size(), kMostOfReason));
  return text.empty() ? "it gave no reason" : bare(text, 4 * kMostOfReason);
}

LoadedPlan::LoadedPlan(std::shared_ptr<TensorRt> library, std::string_view content) : library_(std::move(library)) {
  // As the inline function of the header does it, which would have to be linked.
  runtime_.reset(static_cast<nvinfer1::IRuntime*>(library_->createInferRuntime_INTERNAL(&log_, NV_TENSORRT_VERSION)));
  if (!runtime_) fail("does not start");
  runtime_->setEngineHostCodeAllowed(false);  // the default, set once more
  if (const std::string reason = refusal_of_plan(*runtime_, content); !reason.empty())
    fail_engine(std::string(kTitle) + " " + library_->version + " refuses the plan: " + reason + ".");
  engine_.reset(runtime_->deserializeCudaEngine(content.data(), content.size()));
  if (!engine_) fail("refuses the plan");
  // What is left of the memory, as the library sees it; before a context is made, not after.
  if (engine_->getStreamableWeightsSize() > 0 &&
      !engine_->setWeightStreamingBudgetV2(engine_->getWeightStreamingAutomaticBudget()))
    fail("cannot stream the weights of the plan");
}

void LoadedPlan::fail(const std::string& what) {
  fail_engine(std::string(kTitle) + " " + library_->version + " " + what + ": " + log_.take() + ".");
}

Plan::Plan(std::shared_ptr<LoadedPlan> loaded, std::shared_ptr<Cuda> cuda, const Shapes& shapes,
           std::string_view kernels, std::uint64_t reserve)
    : loaded_(std::move(loaded)), cuda_(std::move(cuda)), made_(make_context(loaded_->engine(), kernels)) {
  if (!made_.context) loaded_->fail("has no memory to run the plan");
  for (const auto& [name, shape] : shapes)
    if (!made_.context->setInputShape(name.c_str(), dims(shape)))
      loaded_->fail("refuses " + name + " of " + list(shape));
  cuda_->scratch.join(std::max<std::uint64_t>(made_.context->updateDeviceMemorySizeForShapes(), reserve));
}

Plan::~Plan() {
  made_.context.reset();  // before the memory that it knows
  cuda_->scratch.leave();
}

void Plan::check_tensor(const std::string& name, const Buffer& buffer, nvinfer1::TensorIOMode mode) const {
  const nvinfer1::ICudaEngine& engine = loaded_->engine();
  const nvinfer1::Dims found = made_.context->getTensorShape(name.c_str());
  bool same = engine.getTensorIOMode(name.c_str()) == mode &&
              engine.getTensorDataType(name.c_str()) == element_type(buffer.dtype()) &&
              found.nbDims == static_cast<int>(buffer.shape().size());
  for (int i = 0; same && i < found.nbDims; ++i) same = found.d[i] == buffer.shape()[static_cast<std::size_t>(i)];
  if (!same)
    fail_engine("the plan has another " + name + " than the graph: delete it, and run tmd-engine build again.");
}

void Plan::run(const Buffers& buffers, const std::function<void(std::string_view)>& keep) {
  if (cuda_->recording && !not_recordable_.empty()) fail_engine(not_recordable_);
  if (moves_ != cuda_->scratch.moves()) {
    if (!cuda_->scratch.address()) fail_engine("the GPU has no memory left for what a graph needs while it runs.");
    made_.context->setDeviceMemoryV2(cuda_->scratch.address(), static_cast<std::int64_t>(cuda_->scratch.size()));
    moves_ = cuda_->scratch.moves();
  }
  for (const auto& [name, buffer] : buffers)
    if (!made_.context->setTensorAddress(name.c_str(), buffer.address()))
      loaded_->fail("refuses the address of " + name);
  if (!made_.context->enqueueV3(cuda_->stream)) loaded_->fail("failed");
  cuda_->wait();
  if (has_run_ || cuda_->recording) return;
  has_run_ = true;
  not_recordable_ = not_recordable(*made_.context, cuda_->stream);
  if (const std::string kernels = made_.compiled(); !kernels.empty()) keep(kernels);
}

}  // namespace tmd::internal::TMD_TRT
