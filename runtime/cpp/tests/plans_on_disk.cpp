#include "plans_on_disk.hpp"

#include <NvInferVersion.h>
#include <dlfcn.h>
#include <unistd.h>

#include <fstream>

#include <nlohmann/json.hpp>

#include "engines/plan_cache.hpp"

namespace fs = std::filesystem;
using namespace tmd::internal;

const char* const kPrompt = "a red circle moving right on a black background";
const std::string kVersion = std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + "." +
                             std::to_string(NV_TENSORRT_PATCH) + "." + std::to_string(NV_TENSORRT_BUILD);
const std::vector<std::string> kGraphs = {"text_encoder", "backbone",      "flow_head",
                                          "update",       "decoder_first", "decoder_step"};

namespace {

Shapes shapes_of(const Bundle& bundle, const PlanOf& plan, const Size& size) {
  const Manifest& m = bundle.manifest;
  const std::int64_t frames = (m.video.frames - 1) / m.latents.temporal_stride + 1,
                     height = (size.height ? size.height : m.video.height) / m.latents.spatial_stride,
                     width = (size.width ? size.width : m.video.width) / m.latents.spatial_stride;
  const bool decodes = plan.graph.compare(0, 7, "decoder") == 0;
  const Dims dims = {{"batch", plan.rows},
                     {"frames", decodes ? 1 : frames},
                     {"height", height},
                     {"width", width},
                     {"text", m.text.max_length},
                     {"tokens", frames * (height / m.model->patch_size[1]) * (width / m.model->patch_size[2])}};
  Shapes shapes;
  for (const TensorSpec& spec : bundle.graph(plan.graph, "be run").inputs) shapes[spec.name] = spec.resolve(dims);
  return shapes;
}

PlanKey key_of(const PlanOf& plan) {
  const Bundle bundle = Bundle::open(plan.bundle);
  const bool for_many = std::string(TMD_TEST_ENGINE) == "tensorrt-rtx";
  const PlanTarget target{TMD_TEST_ENGINE, kVersion, for_many ? "any" : "Fake GPU", for_many ? "rtx" : "12.0", false};
  const Shapes low = shapes_of(bundle, plan, plan.size);
  PlanKey key = plan_key(bundle, bundle.graph(plan.graph, "be run"), low, target);
  if (plan.up_to.width) {
    key["shapes"].clear();
    for (const auto& [name, high] : shapes_of(bundle, plan, plan.up_to)) {
      const std::string least = to_text({{name, low.at(name)}}), most = to_text({{name, high}}).substr(name.size() + 1);
      key["shapes"] += (key["shapes"].empty() ? "" : ", ") + least;
      if (low.at(name) != high) key["shapes"] += ".." + most + ".." + most;
    }
  }
  key["lowered"] = std::string(64, 'a');
  for (const auto& [field, value] : plan.changed) key[field] = value;
  return key;
}

std::string content_of(const PlanOf& plan) {
  return plan.content.empty() ? plan.bundle + "\n" + plan.graph : plan.content;
}

}  // namespace

Disk::Disk() : folder_(fs::temp_directory_path() / ("tmd-plans-" + std::to_string(getpid()))) {
  fs::remove_all(folder_);
  fs::create_directories(folder_ / "cache/tensorrt");
  fs::create_directories(folder_ / "plans");
  fs::permissions(folder_ / "cache/tensorrt", fs::perms::owner_all);
}

Disk::~Disk() { fs::remove_all(folder_); }

void Disk::cache(const PlanOf& plan) const {
  store_entry((folder_ / "cache/tensorrt").string(), key_of(plan), content_of(plan));
}

void Disk::cache_all() const {
  for (const std::string& graph : kGraphs) cache({graph});
}

void Disk::make_folder(const std::vector<PlanOf>& plans, std::int64_t scratch, const char* made_by) const {
  nlohmann::json list = nlohmann::json::array();
  for (const PlanOf& plan : plans) {
    const std::string content = content_of(plan), file = plan.graph + ".plan";
    std::ofstream(folder_ / "plans" / file) << content;
    list.push_back({{"file", file},
                    {"size", content.size()},
                    {"sha256", sha256_hex(content)},
                    {"key", key_of(plan)},
                    {"figures", {{"scratch", scratch}}}});
  }
  const std::string maker = made_by ? made_by : std::string("tmd-engine ") + tmd_version();
  std::ofstream(folder_ / "plans/manifest.json")
      << nlohmann::json{{"schema_version", 1}, {"made_by", maker}, {"plans", list}};
}

std::vector<fs::path> Disk::entries() const {
  std::vector<fs::path> found;
  for (const auto& each : fs::directory_iterator(folder_ / "cache/tensorrt")) found.push_back(each.path());
  return found;
}

Options::Options(const Disk& disk, bool with_folder) : cache_(disk.cache_path()), plans_(disk.plans_path()) {
  engine = TMD_TEST_ENGINE;
  engine_library = TMD_FAKE_TENSORRT;
  plan_cache = cache_.c_str();
  if (with_folder) plans = plans_.c_str();
}

int seen(const std::string& what) {
  void* library = dlopen(TMD_FAKE_TENSORRT, RTLD_NOW | RTLD_LOCAL);
  const std::string name = (what == "launches" ? "fake_cuda_" : "fake_tensorrt_") + what;
  return reinterpret_cast<int (*)()>(dlsym(library, name.c_str()))();
}

tmd::RunOptions seeded(std::int32_t steps, std::int32_t inner_steps) {
  tmd::RunOptions options;
  options.seed = 1;
  options.steps = steps;
  options.inner_steps = inner_steps;
  return options;
}

std::vector<std::uint8_t> on_the_cpu(const tmd::RunOptions& run, const char* bundle) {
  static std::map<std::vector<double>, std::vector<std::uint8_t>> known;
  const bool stills = std::string(bundle) == TMD_TEST_STILLS;
  auto& frames = known[{double(stills), double(run.steps), double(run.inner_steps), double(run.width),
                        double(run.height), run.guidance, run.rho}];
  if (frames.empty()) {
    tmd::OpenOptions options;
    options.engine = "onnxruntime";
    options.threads = 1;
    frames = tmd::Context(bundle, options).generate(kPrompt, run).frames;
  }
  return frames;
}
