// The engine tensorrt on a stand-in for TensorRT and CUDA (fake_tensorrt.cpp): plans found, buffers copied, outer steps
// recorded; the frames are those of ONNX Runtime, which computes behind the stand-in.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <NvInferVersion.h>
#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>

#include "bundle/files.hpp"
#include "engines/plan_cache.hpp"
#include "tmd/tmd.hpp"

namespace fs = std::filesystem;
using namespace tmd::internal;

namespace {

constexpr const char* kPrompt = "a red circle moving right on a black background";
const std::string kVersion = std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + "." +
                             std::to_string(NV_TENSORRT_PATCH) + "." + std::to_string(NV_TENSORRT_BUILD);

struct Cache {
  fs::path folder = fs::temp_directory_path() / ("tmd-plans-" + std::to_string(getpid()));
  Cache() {
    fs::remove_all(folder);
    fs::create_directories(folder / "tensorrt");
    fs::permissions(folder / "tensorrt", fs::perms::owner_all);
  }
  ~Cache() { fs::remove_all(folder); }

  // An entry as tmd-engine build leaves it, for the default size of a bundle; `content` in place of the plan.
  void put(const std::string& graph, const char* content = nullptr, const char* device = "Fake GPU",
           const std::string& folder_of_bundle = TMD_TEST_BUNDLE, std::int64_t rows = 1) const {
    const Bundle bundle = Bundle::open(folder_of_bundle);
    const Manifest& m = bundle.manifest;
    const std::int64_t frames = (m.video.frames - 1) / m.latents.temporal_stride + 1,
                       height = m.video.height / m.latents.spatial_stride,
                       width = m.video.width / m.latents.spatial_stride;
    const bool decodes = graph.compare(0, 7, "decoder") == 0;
    const Dims dims = {{"batch", rows},
                       {"frames", decodes ? 1 : frames},
                       {"height", height},
                       {"width", width},
                       {"text", m.text.max_length},
                       {"tokens", frames * (height / m.model->patch_size[1]) * (width / m.model->patch_size[2])}};
    std::map<std::string, Shape> shapes;
    for (const TensorSpec& spec : bundle.graph(graph, "be run").inputs) shapes[spec.name] = spec.resolve(dims);
    PlanKey key = plan_key(bundle, bundle.graph(graph, "be run"), shapes, {kVersion, device, "9.0", false});
    key["lowered"] = std::string(64, 'a');
    const std::string plan = content ? content : folder_of_bundle + "\n" + graph;
    std::string line;
    for (const auto& [name, value] : key) line += (line.empty() ? "\"" : ", \"") + name + "\": \"" + value + "\"";
    std::ofstream(folder / "tensorrt" / plan_file_name(key))
        << "{\"key\": {" << line << "}, \"sha256\": \"" << sha256_hex(plan) << "\", \"size\": " << plan.size() << "}\n"
        << plan;
  }
  void put_all() const {
    for (const char* graph : {"text_encoder", "backbone", "flow_head", "update", "decoder_first", "decoder_step"})
      put(graph);
  }
};

struct Options : tmd::OpenOptions {
  std::string cache;
  explicit Options(const Cache& made) : cache(made.folder.string()) {
    engine = "tensorrt";
    engine_library = TMD_FAKE_TENSORRT;
    plan_cache = cache.c_str();
  }
};

tmd::RunOptions seeded(std::int32_t steps = TMD_DEFAULT, std::int32_t inner_steps = TMD_DEFAULT) {
  tmd::RunOptions options;
  options.seed = 1;
  options.steps = steps;
  options.inner_steps = inner_steps;
  return options;
}

int launches() {
  const auto count =
      reinterpret_cast<int (*)()>(dlsym(dlopen(TMD_FAKE_TENSORRT, RTLD_NOW | RTLD_LOCAL), "fake_tensorrt_launches"));
  return count();
}

std::vector<std::uint8_t> on_the_cpu(const tmd::RunOptions& run, const char* bundle = TMD_TEST_BUNDLE) {
  tmd::OpenOptions options;
  options.engine = "onnxruntime";
  options.threads = 1;
  return tmd::Context(bundle, options).generate(kPrompt, run).frames;
}

}  // namespace

TEST_CASE("frames are those of the engine behind it, and outer steps after the first are one launch each") {
  const Cache cache;
  cache.put_all();
  tmd::Context context(TMD_TEST_BUNDLE, Options(cache));
  CHECK(std::string(context.describe().engine) == "tensorrt");
  CHECK(std::string(context.describe().engine_version) == kVersion);
  int before = launches();
  const auto launched = [&] {
    const int now = launches(), more = now - before;
    before = now;
    return more;
  };
  CHECK(context.generate(kPrompt, seeded(2, 2)).frames == on_the_cpu(seeded(2, 2)));
  CHECK(launched() == 1);
  CHECK(context.generate(kPrompt, seeded(2, 2)).frames == on_the_cpu(seeded(2, 2)));
  CHECK(launched() == 2);  // what was recorded is still there
  CHECK(context.generate(kPrompt, seeded(2, 4)).frames == on_the_cpu(seeded(2, 4)));
  CHECK(launched() == 1);  // another number of inner steps is recorded anew
  CHECK(context.generate(kPrompt, seeded(1, 1)).frames == on_the_cpu(seeded(1, 1)));
  CHECK(launched() == 0);
  tmd::RunOptions watched = seeded(2, 2);
  int previews = 0;
  watched.previews = [&](const tmd::Piece& piece) { return previews += piece.first == 0, true; };
  CHECK(context.generate(kPrompt, watched).frames == on_the_cpu(seeded(2, 2)));
  CHECK(previews == 1);
}

TEST_CASE("a run can be stopped in every stage, recorded steps too, and the context goes on") {
  const Cache cache;
  cache.put_all();
  tmd::Context context(TMD_TEST_BUNDLE, Options(cache));
  const std::vector<std::uint8_t> expected = on_the_cpu(seeded(2, 2));
  for (int round = 0; round < 2; ++round)
    for (const tmd_stage stage : {TMD_STAGE_TEXT, TMD_STAGE_BACKBONE, TMD_STAGE_FLOW_HEAD, TMD_STAGE_DECODE}) {
      tmd::RunOptions options = seeded(2, 2);
      options.progress = [&](const tmd_progress& p) { return p.stage != stage || p.step != p.total; };
      CHECK(context.try_generate(kPrompt, options).status == TMD_CANCELLED);
      CHECK(context.generate(kPrompt, seeded(2, 2)).frames == expected);
    }
}

TEST_CASE("clones take turns on one stream and give the same frames") {
  const Cache cache;
  cache.put_all();
  tmd::Context context(TMD_TEST_BUNDLE, Options(cache));
  const std::vector<std::uint8_t> expected = on_the_cpu(seeded(2, 2));
  std::vector<std::future<bool>> runs;
  for (int i = 0; i < 3; ++i)
    runs.push_back(std::async(std::launch::async, [&expected, clone = std::make_shared<tmd::Context>(context.clone())] {
      bool same = true;
      for (int run = 0; run < 2; ++run) same = same && clone->generate(kPrompt, seeded(2, 2)).frames == expected;
      return same;
    }));
  for (auto& run : runs) CHECK(run.get());
}

TEST_CASE("stills of a Transition Model, without and with guidance, previews and a picture to start from") {
  const Cache cache;
  for (const char* graph : {"text_encoder", "backbone", "flow_head", "update", "decoder_first", "encoder"})
    for (const std::int64_t rows : {1, 2}) cache.put(graph, nullptr, "Fake GPU", TMD_TEST_STILLS, rows);
  tmd::Context context(TMD_TEST_STILLS, Options(cache));
  const std::vector<std::uint8_t> plain = on_the_cpu(seeded(3), TMD_TEST_STILLS);
  CHECK(context.generate(kPrompt, seeded(3)).frames == plain);
  tmd::RunOptions guided = seeded(3);
  guided.guidance = 2;
  guided.rho = 0.4;
  const std::vector<std::uint8_t> expected = on_the_cpu(guided, TMD_TEST_STILLS);
  int previews = 0;
  guided.previews = [&](const tmd::Piece&) { return ++previews > 0; };
  CHECK(context.generate(kPrompt, guided).frames == expected);
  CHECK((previews == 2 && expected != plain));
  tmd::OpenOptions cpu;
  cpu.engine = "onnxruntime";
  cpu.threads = 1;
  CHECK(context.encode_image(plain.data(), 64, 64) ==
        tmd::Context(TMD_TEST_STILLS, cpu).encode_image(plain.data(), 64, 64));
  tmd::RunOptions hurried = seeded();
  hurried.deadline = 0.2;
  CHECK(context.generate(kPrompt, hurried).times.back() == 0);
}

TEST_CASE("what is missing or refused is one sentence that says what to do") {
  const Cache cache;
  tmd::Context context(TMD_TEST_BUNDLE, Options(cache));
  const auto said = [&] {
    CHECK(context.try_generate(kPrompt, seeded()).status == TMD_ERROR_ENGINE);
    return context.error();
  };
  CHECK(said().find("tmd-engine build BUNDLE --size") != std::string::npos);
  cache.put("text_encoder", nullptr, "Another GPU");
  CHECK(said().find("device: 'Another GPU' there, 'Fake GPU' here") != std::string::npos);
  cache.put("text_encoder", "no plan");
  CHECK(said().find("refuses the plan: 'magic tag does not match'") != std::string::npos);
  cache.put("text_encoder", TMD_TEST_BUNDLE "\nbackbone");  // a plan of another graph under this key
  CHECK(said().find("TensorRT " + kVersion + " refuses the shape of") != std::string::npos);
  cache.put_all();
  CHECK(context.generate(kPrompt, seeded(2, 2)).frames == on_the_cpu(seeded(2, 2)));
}

TEST_CASE("devices and engines go together") {
  const Cache cache;
  Options options(cache);
  options.device = "cpu";
  tmd::Context context;
  CHECK(context.try_open(TMD_TEST_BUNDLE, options) == TMD_ERROR_USAGE);
  CHECK(context.error().find("the engine tensorrt runs on the device cuda, not on cpu") != std::string::npos);
  options.device = "cuda";
  CHECK(context.try_open(TMD_TEST_BUNDLE, options) == TMD_OK);
  options.engine = "auto";
  CHECK(context.try_open(TMD_TEST_BUNDLE, options) == TMD_OK);
  CHECK(std::string(context.describe().engine) == "tensorrt");
}
