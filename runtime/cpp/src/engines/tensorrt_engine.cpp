#include "engines/tensorrt_engine.hpp"

#include <mutex>
#include <optional>
#include <utility>

#include "base/quote.hpp"
#include "base/stopping.hpp"
#include "engines/plan_cache.hpp"
#include "engines/plan_folder.hpp"
#include "engines/tensorrt_plan.hpp"

namespace tmd::internal::TMD_TRT {
namespace {

constexpr double kStreamAbove = 0.8;  // of the device's memory; tmd_engines.tensorrt.engine gives the reason

// What the graphs of one engine share.
struct Place {
  std::shared_ptr<TensorRt> library;
  std::shared_ptr<Cuda> cuda;
  std::string cache;                 // folder of this user's plans and kernels
  std::optional<PlanFolder> folder;  // plans made ahead of time
  std::uint64_t reserve = 0;         // bytes of scratch memory for the largest of them, so that it does not move later

  std::mutex mutex;
  std::string notes;

  // Once for each text, whatever number of graphs says it.
  void note(const std::string& text) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (notes.find(text) == std::string::npos) notes += text + "\n";
  }
};

class TensorRtStep : public Step {
 public:
  TensorRtStep(std::shared_ptr<Place> place, std::shared_ptr<Plan> plan, PlanKey kernels_key, const Buffers& inputs,
               const Buffers& outputs)
      : place_(std::move(place)), plan_(std::move(plan)), kernels_key_(std::move(kernels_key)), buffers_(inputs) {
    buffers_.insert(outputs.begin(), outputs.end());
    for (const auto& [name, buffer] : inputs) plan_->check_tensor(name, buffer, nvinfer1::TensorIOMode::kINPUT);
    for (const auto& [name, buffer] : outputs) plan_->check_tensor(name, buffer, nvinfer1::TensorIOMode::kOUTPUT);
  }

  void run() override {
    check_stopped();
    const CudaLock lock(place_->cuda->mutex);
    plan_->run(buffers_, [this](std::string_view kernels) { store_entry(place_->cache, kernels_key_, kernels); });
  }

 private:
  std::shared_ptr<Place> place_;
  std::shared_ptr<Plan> plan_;
  PlanKey kernels_key_;
  Buffers buffers_;
};

// One graph, with a plan per combination of input shapes, or one for a range of them. The latest plan is kept, and
// those of older sizes as long as a step uses them.
class TensorRtGraph : public LoadedGraph {
 public:
  TensorRtGraph(std::shared_ptr<Place> place, const Bundle& bundle, const GraphInfo& info, PlanTarget target)
      : place_(std::move(place)), bundle_(bundle), info_(info), target_(std::move(target)) {}

  const GraphInfo& info() const override { return info_; }

  bool records() const override { return true; }
  std::unique_ptr<Step> record(const std::function<void()>& work) override {
    try {
      return record_cuda_graph(place_->cuda, work);
    } catch (const Error& error) {
      place_->note(std::string("steps are launched one by one, not as one CUDA graph: ") + error.what());
      return nullptr;
    }
  }

 private:
  struct Ready {
    PlanKey kernels_key;
    std::shared_ptr<Plan> plan;
  };

  std::unique_ptr<Step> tie(const Buffers& inputs, const Buffers& outputs) override {
    Ready ready = plan_for(inputs);
    return std::make_unique<TensorRtStep>(place_, std::move(ready.plan), std::move(ready.kernels_key), inputs, outputs);
  }

  Buffer allocate(DType dtype, Shape shape) const override {
    return cuda_buffer(place_->cuda, dtype, std::move(shape));
  }

  Ready plan_for(const Buffers& inputs) {
    Shapes shapes;
    for (const auto& [name, buffer] : inputs) shapes[name] = buffer.shape();
    const std::lock_guard<std::mutex> lock(mutex_);
    Known& known = known_[shapes];
    std::shared_ptr<Plan> plan = known.plan.lock();
    if (!plan) {
      latest_.reset();
      const CudaLock turn(place_->cuda->mutex);
      plan = make(shapes, known.kernels_key);
      known.plan = plan;
    }
    latest_ = plan;
    return {known.kernels_key, plan};
  }

  // As Python does it: the folder, if one was named, and where that has no such plan, this user's cache.
  std::shared_ptr<Plan> make(const Shapes& shapes, PlanKey& kernels_key) {
    const PlanKey wanted = plan_key(bundle_, info_, shapes, target_);
    std::string before;
    if (place_->folder) {
      try {
        return load(place_->folder->find(wanted, place_->cuda->capability), shapes, kernels_key);
      } catch (const Error& error) {
        before = error.what();
      }
    }
    try {
      std::shared_ptr<Plan> made = load(find_plan(place_->cache, wanted), shapes, kernels_key);
      if (!before.empty()) place_->note(before + ": taken from the cache");
      return made;
    } catch (const Error& error) {
      if (before.empty()) throw;
      const bool ends = before.back() == '.';
      fail_engine(before + (ends ? " In the cache " : ", and in the cache ") + error.what());
    }
  }

  std::shared_ptr<Plan> load(const FoundPlan& found, const Shapes& shapes, PlanKey& kernels_key) {
    if (!loaded_ || loaded_key_ != found.key) {
      loaded_.reset();  // two copies of a large model do not fit side by side
      loaded_ = std::make_shared<LoadedPlan>(place_->library, found.content.bytes());
      loaded_key_ = found.key;
    }
    kernels_key = found.key;
    kernels_key["title"] = "kernels of " + value_of(found.key, "title");
    kernels_key["device"] = place_->cuda->device;
    kernels_key["compute capability"] = to_text(place_->cuda->capability);
    kernels_key["plan for"] = value_of(found.key, "shapes");
    kernels_key["shapes"] = to_text(shapes);
    const MappedFile kernels = load_entry(place_->cache, kernels_key);
    try {
      return std::make_shared<Plan>(loaded_, place_->cuda, shapes, kernels.bytes(), place_->reserve);
    } catch (...) {
      loaded_.reset();  // another plan may lie there under this key the next time
      throw;
    }
  }

  struct Known {
    PlanKey kernels_key;
    std::weak_ptr<Plan> plan;
  };

  std::shared_ptr<Place> place_;
  Bundle bundle_;
  GraphInfo info_;
  PlanTarget target_;
  std::mutex mutex_;
  std::map<Shapes, Known> known_;
  std::shared_ptr<Plan> latest_;
  PlanKey loaded_key_;
  std::shared_ptr<LoadedPlan> loaded_;
};

class TensorRtEngine : public Engine {
 public:
  explicit TensorRtEngine(const EngineOptions& options) : place_(std::make_shared<Place>()) {
    if (!options.plans.empty()) {
      place_->folder.emplace(options.plans);
      place_->reserve = place_->folder->scratch();
    }
    place_->cache = plan_cache_folder(options.plan_cache);
    place_->library = TensorRt::open(options.library);
    place_->cuda = Cuda::open();
    if (options.engine != kEngine)  // "auto"
      if (const std::string reason = not_by_itself(*place_->cuda); !reason.empty()) fail_engine(reason);
  }

  const char* name() const override { return kEngine; }
  std::string version() const override { return place_->library->version; }
  bool on_device() const override { return true; }
  std::string take_notes() override {
    const std::lock_guard<std::mutex> lock(place_->mutex);
    return std::exchange(place_->notes, std::string());
  }

  std::shared_ptr<LoadedGraph> load(const Bundle& bundle, const GraphInfo& info) override {
    check_graph_types(info);
    const Cuda& cuda = *place_->cuda;
    const std::string graph = graph_name(bundle, info);
    if (const std::string reason = refusal(info.precision, cuda.capability); !reason.empty())
      fail_engine("Graph " + graph + " does not run on " + cuda.device + ": " + reason + ".");
    PlanTarget target = target_of(place_->library->version, cuda);
    target.weight_streaming =
        static_cast<double>(weights_beside(bundle.manifest, graph)) > kStreamAbove * static_cast<double>(cuda.memory);
    return std::make_shared<TensorRtGraph>(place_, bundle, info, target);
  }

 private:
  std::shared_ptr<Place> place_;
};

}  // namespace

std::shared_ptr<Engine> open(const EngineOptions& options) { return std::make_shared<TensorRtEngine>(options); }

}  // namespace tmd::internal::TMD_TRT
