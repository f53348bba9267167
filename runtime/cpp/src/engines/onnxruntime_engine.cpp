#include "engines/onnxruntime_engine.hpp"

#include <vector>

#include "base/stopping.hpp"
#include "engines/cpu.hpp"
#include "engines/onnxruntime_library.hpp"
#include "engines/onnxruntime_lowering.hpp"

namespace tmd::internal {
namespace {

using Library = std::shared_ptr<OnnxRuntime>;
template <typename T>
using Owner = std::unique_ptr<T, void (*)(T*)>;

ONNXTensorElementDataType element_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case DType::f16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case DType::bf16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case DType::i64:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case DType::i32:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case DType::u8:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    case DType::boolean:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
  }
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

// One session, for every size of its inputs; runs of several threads may be inside at once.
class OnnxRuntimeGraph : public LoadedGraph, public std::enable_shared_from_this<OnnxRuntimeGraph> {
 public:
  OnnxRuntimeGraph(Library library, const Bundle& bundle, const GraphInfo& info, std::int32_t threads)
      : library_(std::move(library)), info_(info), memory_(cpu_memory()), session_(open(bundle, threads)) {}

  const GraphInfo& info() const override { return info_; }

  const OrtApi& api() const { return *library_->api; }
  void check(OrtStatus* status, const std::string& what) const { library_->check(status, what); }
  OrtSession* session() const { return session_.get(); }
  const OrtMemoryInfo* memory() const { return memory_.get(); }

 private:
  std::unique_ptr<Step> tie(const Buffers& inputs, const Buffers& outputs) override;
  Owner<OrtMemoryInfo> cpu_memory() const {
    OrtMemoryInfo* memory = nullptr;
    check(api().CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory), "cannot name the CPU's memory");
    return {memory, api().ReleaseMemoryInfo};
  }

  // The settings are Python's.
  Owner<OrtSession> open(const Bundle& bundle, std::int32_t threads) const {
    const std::string path = bundle.graph_path(info_), what = library_->version + " cannot load " + path;
    const std::string data = bundle.data_path(info_);
    const std::size_t slash = data.rfind('/');
    const std::string folder = data.empty() ? bundle.folder : data.substr(0, slash + 1);
    const std::string weights = data.empty() ? "" : data.substr(slash + 1);
    const bool literal = info_.precision == "fp8" || info_.precision == "nvfp4";
    const bool unsigned_activations = !literal && fast_unsigned_products();
    const std::string model = lower_for_onnxruntime(bundle.read_graph(info_), path, unsigned_activations, weights);
    OrtSessionOptions* made = nullptr;
    check(api().CreateSessionOptions(&made), what);
    const Owner<OrtSessionOptions> options(made, api().ReleaseSessionOptions);
    const auto set = [&](const char* name, const char* value) {
      check(api().AddSessionConfigEntry(options.get(), name, value), what);
    };
    check(api().SetIntraOpNumThreads(options.get(), threads == TMD_DEFAULT ? 0 : threads), what);
    // The weights stay in the bundle's data file, which ONNX Runtime maps.
    set("session.model_external_initializers_file_folder_path", folder.c_str());
    set("session.force_spinning_stop", "1");
    // The fusion of Q/DQ with products takes every type for int8, and skips roundings.
    if (literal) set("session.disable_quant_qdq", "1");
    if (!literal && widens_in_products(model)) {
      set("optimization.constant_folding_max_output_size_in_bytes", std::to_string(kWidenedBytes).c_str());
      // It widens weights in float16 for good.
      set("optimization.disable_specified_optimizers", "FuseFp16InitializerToFp32NodeTransformer");
    }
    check(api().DisableMemPattern(options.get()), what);
    OrtSession* session = nullptr;
    check(api().CreateSessionFromArray(library_->environment, model.data(), model.size(), options.get(), &session),
          what);
    return {session, api().ReleaseSession};
  }

  // In this order: the session goes before the library.
  Library library_;
  GraphInfo info_;
  Owner<OrtMemoryInfo> memory_;
  Owner<OrtSession> session_;
};

class OnnxRuntimeStep : public Step, private Stoppable {
 public:
  OnnxRuntimeStep(std::shared_ptr<OnnxRuntimeGraph> graph, const Buffers& inputs, const Buffers& outputs)
      : graph_(std::move(graph)), options_(new_options()), binding_(new_binding()) {
    const OrtApi& api = graph_->api();
    for (const auto& [name, buffer] : inputs) tie(api.BindInput, name, buffer);
    for (const auto& [name, buffer] : outputs) tie(api.BindOutput, name, buffer);
  }

  void run() override {
    const std::string what = "failed in " + graph_->info().file;
    graph_->check(graph_->api().RunOptionsUnsetTerminate(options_.get()), what);
    const Running running(*this);
    graph_->check(graph_->api().RunWithBinding(graph_->session(), options_.get(), binding_.get()), what);
  }

 private:
  // Ends a run that another thread is in, after the node that it is at.
  void stop() noexcept override {
    if (OrtStatus* status = graph_->api().RunOptionsSetTerminate(options_.get())) graph_->api().ReleaseStatus(status);
  }
  Owner<OrtRunOptions> new_options() const {
    OrtRunOptions* options = nullptr;
    graph_->check(graph_->api().CreateRunOptions(&options), "cannot bind " + graph_->info().file);
    return {options, graph_->api().ReleaseRunOptions};
  }
  Owner<OrtIoBinding> new_binding() const {
    OrtIoBinding* binding = nullptr;
    graph_->check(graph_->api().CreateIoBinding(graph_->session(), &binding), "cannot bind " + graph_->info().file);
    return {binding, graph_->api().ReleaseIoBinding};
  }

  template <typename Bind>
  void tie(Bind bind, const std::string& name, const Buffer& buffer) {
    const std::string what = "cannot bind " + name + " of " + graph_->info().file;
    OrtValue* made = nullptr;
    graph_->check(graph_->api().CreateTensorWithDataAsOrtValue(graph_->memory(), buffer.address(), buffer.bytes(),
                                                               buffer.shape().data(), buffer.shape().size(),
                                                               element_type(buffer.dtype()), &made),
                  what);
    const Owner<OrtValue> value(made, graph_->api().ReleaseValue);
    graph_->check(bind(binding_.get(), name.c_str(), value.get()), what);
    kept_.push_back(buffer);
  }

  // In this order: the binding goes before the session.
  std::shared_ptr<OnnxRuntimeGraph> graph_;
  std::vector<Buffer> kept_;  // ONNX Runtime has only the addresses
  Owner<OrtRunOptions> options_;
  Owner<OrtIoBinding> binding_;
};

std::unique_ptr<Step> OnnxRuntimeGraph::tie(const Buffers& inputs, const Buffers& outputs) {
  return std::make_unique<OnnxRuntimeStep>(shared_from_this(), inputs, outputs);
}

class OnnxRuntimeEngine : public Engine {
 public:
  explicit OnnxRuntimeEngine(const EngineOptions& options)
      : library_(OnnxRuntime::open(options.library)), threads_(options.threads) {}

  const char* name() const override { return "onnxruntime"; }
  std::string version() const override { return library_->version; }

  std::shared_ptr<LoadedGraph> load(const Bundle& bundle, const GraphInfo& info) override {
    check_graph_types(info);
    return std::make_shared<OnnxRuntimeGraph>(library_, bundle, info, threads_);
  }

 private:
  Library library_;
  std::int32_t threads_;
};

}  // namespace

std::shared_ptr<Engine> open_onnxruntime(const EngineOptions& options) {
  return std::make_shared<OnnxRuntimeEngine>(options);
}

}  // namespace tmd::internal
