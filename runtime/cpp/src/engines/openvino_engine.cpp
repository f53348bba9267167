#include "engines/openvino_engine.hpp"

#include <functional>
#include <mutex>
#include <vector>

#include "base/stopping.hpp"
#include "engines/decimal_point.hpp"
#include "engines/openvino_library.hpp"
#include "engines/private_folder.hpp"
#include "engines/resident_pages.hpp"

namespace tmd::internal {
namespace {

using Library = std::shared_ptr<OpenVino>;
using Compiled = std::shared_ptr<ov_compiled_model_t>;
using Owner = std::unique_ptr<void, std::function<void(void*)>>;

ov_element_type_e element_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return F32;
    case DType::f16:
      return F16;
    case DType::bf16:
      return BF16;
    case DType::i64:
      return I64;
    case DType::i32:
      return I32;
    case DType::u8:
      return U8;
    case DType::boolean:
      return BOOLEAN;
  }
  return DYNAMIC;
}

class OpenVinoStep : public Step, private Stoppable {
 public:
  OpenVinoStep(Library library, std::string file, Compiled compiled, const Buffers& inputs, const Buffers& outputs)
      : library_(std::move(library)), file_(std::move(file)), compiled_(std::move(compiled)) {
    ov_infer_request_t* request = nullptr;
    library_->check(library_->ov_compiled_model_create_infer_request(compiled_.get(), &request),
                    "cannot make a request for " + file_);
    const auto free = library_->ov_infer_request_free;
    request_ = {request, [free](ov_infer_request_t* r) { free(r); }};
    for (const Buffers* buffers : {&inputs, &outputs})
      for (const auto& [name, buffer] : *buffers) set_tensor(name, buffer);
  }

  void run() override {
    const std::string what = "failed in " + file_;
    const Running running(*this);
    // Not ov_infer_request_infer: with one stream that one runs to its end, whoever cancels it (OpenVINO 2026.4.1).
    library_->check(library_->ov_infer_request_start_async(request_.get()), what);
    library_->check(library_->ov_infer_request_wait(request_.get()), what);
  }

 private:
  // Ends a run that another thread is in, after the node that it is at.
  void stop() noexcept override { library_->ov_infer_request_cancel(request_.get()); }
  void set_tensor(const std::string& name, const Buffer& buffer) {
    const std::string what = "cannot bind " + name + " of " + file_;
    const auto rank = static_cast<std::int64_t>(buffer.shape().size());
    ov_shape_t shape{};
    library_->check(library_->ov_shape_create(rank, buffer.shape().data(), &shape), what);
    const Owner shape_owner(&shape, [this](void* s) { library_->ov_shape_free(static_cast<ov_shape_t*>(s)); });
    ov_tensor_t* tensor = nullptr;
    library_->check(
        library_->ov_tensor_create_from_host_ptr(element_type(buffer.dtype()), shape, buffer.address(), &tensor), what);
    const Owner tensor_owner(tensor, [this](void* t) { library_->ov_tensor_free(static_cast<ov_tensor_t*>(t)); });
    library_->check(library_->ov_infer_request_set_tensor(request_.get(), name.c_str(), tensor), what);
    kept_.push_back(buffer);
  }

  // In this order: the request goes before the compiled graph, and both before the library.
  Library library_;
  std::string file_;
  Compiled compiled_;
  std::vector<Buffer> kept_;  // OpenVINO has only the addresses
  std::unique_ptr<ov_infer_request_t, std::function<void(ov_infer_request_t*)>> request_;
};

// One graph, compiled once per combination of input shapes; the length of prompts that keep their own is left open, as
// tmd_engines/openvino/engine.py says. The latest compiled one is kept, and those of older sizes as long as a step uses
// them.
class OpenVinoGraph : public LoadedGraph {
 public:
  OpenVinoGraph(Library library, const Bundle& bundle, const GraphInfo& info, std::int32_t threads)
      : library_(std::move(library)), bundle_(bundle), info_(info), threads_(threads) {
    PageRanges weights;
    free_model(read_model(weights));  // a graph that OpenVINO cannot read is an error of loading
  }

  const GraphInfo& info() const override { return info_; }

 private:
  std::unique_ptr<Step> tie(const Buffers& inputs, const Buffers& outputs) override {
    const Compiled compiled = compiled_for(inputs);
    return std::make_unique<OpenVinoStep>(library_, info_.file, compiled, inputs, outputs);
  }

  using Shapes = std::map<std::string, Shape>;
  static constexpr std::int64_t kAnyLength = -1;  // in the shapes that a graph is compiled for

  // `weights` gets where its weights are mapped.
  ov_model_t* read_model(PageRanges& weights) const {
    const DecimalPoint point;
    // OpenVINO finds a data file only beside a graph that it reads itself. So that it reads the bytes that were
    // checked, whatever happens to the bundle meanwhile, they lie in a folder of our own beside a second name of the
    // data file.
    const std::string content = bundle_.read_graph(info_), path = bundle_.graph_path(info_);
    const std::string data = bundle_.data_path(info_);
    const auto fill = [&](PrivateFolder& folder) {
      return folder.write(info_.file, content) && (data.empty() || folder.link(data, *info_.data));
    };
    // A second name must be in the same file system as the first.
    PrivateFolder temporary, beside(data.substr(0, data.rfind('/')));
    PrivateFolder* const folder = fill(temporary) ? &temporary : !data.empty() && fill(beside) ? &beside : nullptr;
    const bool apart = folder != nullptr;
    if (!apart && !data.empty() && data != bundle_.folder + "/" + *info_.data)
      fail_engine("OpenVINO needs the weights " + data +
                  " under a second name, which neither the folder for temporary files nor their own takes: copy the "
                  "bundle with its links followed (cp -rL), or use the engine onnxruntime.");
    ov_model_t* model = nullptr;
    library_->check(library_->ov_core_read_model(library_->core, (apart ? folder->path(info_.file) : path).c_str(),
                                                 nullptr, &model),
                    library_->version + " cannot load " + path);
    Owner owner(model, [this](void* m) { free_model(static_cast<ov_model_t*>(m)); });
    if (!apart) bundle_.read_graph(info_);  // throws if it is not the same any more
    // Under a name of our own, the mapping is this model's and nobody else's.
    if (apart && !data.empty()) weights = mapped_ranges(folder->real_path(*info_.data));
    owner.release();
    return model;
  }
  void free_model(ov_model_t* model) const { library_->ov_model_free(model); }

  Compiled compiled_for(const Buffers& inputs) {
    Shapes shapes;
    for (const auto& [name, buffer] : inputs) shapes[name] = buffer.shape();
    if (!bundle_.manifest.text.is_padded())
      for (const TensorSpec& spec : info_.inputs)
        for (std::size_t k = 0; k < spec.shape.size(); ++k)
          if (spec.shape[k].symbol == "text") shapes[spec.name][k] = kAnyLength;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto before = known_.find(shapes);
    Compiled compiled = before == known_.end() ? nullptr : before->second.lock();
    if (!compiled) {
      latest_.reset();  // two compiled copies of a large model do not fit side by side
      for (auto each = known_.begin(); each != known_.end();)
        each = each->second.expired() ? known_.erase(each) : ++each;
      compiled = compile(shapes);
      known_[shapes] = compiled;
    }
    latest_ = compiled;
    return compiled;
  }

  Compiled compile(const Shapes& shapes) const {
    const DecimalPoint point;
    const std::string what = "cannot compile " + info_.file;
    PageRanges weights;
    ov_model_t* model = read_model(weights);
    const Owner model_owner(model, [this](void* m) { free_model(static_cast<ov_model_t*>(m)); });

    std::vector<const char*> names;
    std::vector<ov_partial_shape_t> partial;
    partial.reserve(shapes.size());
    const Owner shapes_owner(&partial, [this, &partial](void*) {
      for (ov_partial_shape_t& shape : partial) library_->ov_partial_shape_free(&shape);
    });
    for (const auto& [name, shape] : shapes) {
      std::vector<ov_dimension_t> dimensions;
      for (const std::int64_t size : shape)
        dimensions.push_back(size == kAnyLength ? ov_dimension_t{1, bundle_.manifest.text.max_length}
                                                : ov_dimension_t{size, size});
      ov_partial_shape_t one{};
      library_->check(
          library_->ov_partial_shape_create(static_cast<std::int64_t>(shape.size()), dimensions.data(), &one), what);
      names.push_back(name.c_str());
      partial.push_back(one);
    }
    library_->check(library_->ov_model_reshape(model, names.data(), partial.data(), names.size()), what);

    // Numbers depend on the first two; tmd_engines/openvino/engine.py gives the reasons.
    const char* p[] = {"INFERENCE_PRECISION_HINT",
                       "f32",
                       "DYNAMIC_QUANTIZATION_GROUP_SIZE",
                       "0",
                       "PERFORMANCE_HINT",
                       "LATENCY",
                       "NUM_STREAMS",
                       "1",
                       "ENABLE_CPU_PINNING",
                       "NO"};
    ov_compiled_model_t* compiled = nullptr;
    // It packs the weights into memory of its own, and the model keeps the mapping that they come from.
    const DroppingPages dropping(std::move(weights));
    if (threads_ == TMD_DEFAULT) {
      library_->check(library_->ov_core_compile_model(library_->core, model, "CPU", 10, &compiled, p[0], p[1], p[2],
                                                      p[3], p[4], p[5], p[6], p[7], p[8], p[9]),
                      what);
    } else {
      const std::string threads = std::to_string(threads_);
      library_->check(
          library_->ov_core_compile_model(library_->core, model, "CPU", 12, &compiled, p[0], p[1], p[2], p[3], p[4],
                                          p[5], p[6], p[7], p[8], p[9], "INFERENCE_NUM_THREADS", threads.c_str()),
          what);
    }
    const Library library = library_;
    return {compiled, [library](ov_compiled_model_t* c) { library->ov_compiled_model_free(c); }};
  }

  Library library_;
  Bundle bundle_;
  GraphInfo info_;
  std::int32_t threads_;
  std::mutex mutex_;
  std::map<Shapes, std::weak_ptr<ov_compiled_model_t>> known_;
  Compiled latest_;
};

class OpenVinoEngine : public Engine {
 public:
  explicit OpenVinoEngine(const EngineOptions& options)
      : library_(OpenVino::open(options.library)), threads_(options.threads) {}

  const char* name() const override { return "openvino"; }
  std::string version() const override { return library_->version; }
  Holding holding() const override { return kOpenVinoHolding; }

  std::shared_ptr<LoadedGraph> load(const Bundle& bundle, const GraphInfo& info) override {
    check_graph_types(info);
    if (info.precision == "nvfp4")
      fail_engine("the graph " + info.file + " is nvfp4, which the engine openvino does not compute: use onnxruntime.");
    return std::make_shared<OpenVinoGraph>(library_, bundle, info, threads_);
  }

 private:
  Library library_;
  std::int32_t threads_;
};

}  // namespace

std::shared_ptr<Engine> open_openvino(const EngineOptions& options) {
  return std::make_shared<OpenVinoEngine>(options);
}

}  // namespace tmd::internal
