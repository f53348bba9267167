// Plans made ahead of time, one plan for a range of sizes, shared scratch memory and kept kernels, on the stand-ins.
#include <doctest/doctest.h>

#include <cstdlib>
#include <fstream>
#include <string>

#include "plans_on_disk.hpp"

namespace fs = std::filesystem;

namespace {

constexpr bool kForRtx = std::string_view(TMD_TEST_ENGINE) == "tensorrt-rtx";
constexpr Size kSmall = {32, 32}, kLarge = {64, 64};

std::vector<PlanOf> all(const tmd::internal::PlanKey& changed = {}) {
  std::vector<PlanOf> plans;
  for (const std::string& graph : kGraphs) plans.push_back({graph, changed});
  return plans;
}

tmd::RunOptions sized(Size size) {
  tmd::RunOptions run = seeded(2, 2);
  run.width = static_cast<std::int32_t>(size.width);
  run.height = static_cast<std::int32_t>(size.height);
  return run;
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// For as long as it lives.
struct Variable {
  const char* name;
  Variable(const char* which, const char* value) : name(which) { ::setenv(name, value, 1); }
  ~Variable() { ::unsetenv(name); }
};

std::vector<std::string> kernels_in(const Disk& disk) {
  std::vector<std::string> found;
  for (const fs::path& path : disk.entries()) {
    std::string line;
    std::getline(std::ifstream(path) >> std::ws, line);
    if (has(line, "\"title\": \"kernels of ")) found.push_back(line);
  }
  return found;
}

}  // namespace

TEST_CASE("plans of a folder that the application names are used, without a cache") {
  const Disk disk;
  disk.make_folder(all());
  tmd::Context context(TMD_TEST_BUNDLE, Options(disk, true));
  CHECK(context.generate(kPrompt, seeded(2, 2)).frames == on_the_cpu(seeded(2, 2)));
  CHECK(context.warnings().empty());
}

TEST_CASE("a plan for something else is not used, and the field is named") {
  const Disk disk;
  const std::string engine = std::string("engine: " TMD_TEST_ENGINE " 9.9.9.9 there, " TMD_TEST_ENGINE " ") + kVersion;
  const std::vector<std::tuple<std::string, std::string, std::string>> fields = {
      {"engine", TMD_TEST_ENGINE " 9.9.9.9", engine + " here"},
      {"compute capability", "8.6", "compute capability: 8.6 there, 12.0 here"},
      {"graph", "ab cd", "graph: ab cd there, "},
      {"precision", "fp8", "precision: fp8 there, fp32 here"},
      {"device", "Another", "device: Another there, "},
      {"flags", "workspace None, weight streaming True, no TF32", "flags: workspace None, weight streaming True"},
      {"surprise", "yes", "surprise: yes there, nothing here"}};
  for (const auto& [field, value, words] : fields) {
    disk.make_folder(all({{field, value}}));
    tmd::Context context(TMD_TEST_BUNDLE, Options(disk, true));
    CHECK(context.try_generate(kPrompt, seeded(2, 2)).status == TMD_ERROR_ENGINE);
    CHECK_MESSAGE(has(context.error(),
                      "the plan of tiny text_encoder in " + disk.plans_path() + " is for something else (" + words),
                  context.error());
    CHECK(has(context.error(), "and in the cache there is no plan of 'tiny text_encoder' for "));
  }
  disk.make_folder(all(), 0, "tmd-engine 0.0.1");
  tmd::Context context(TMD_TEST_BUNDLE, Options(disk, true));
  CHECK(context.try_generate(kPrompt, seeded(2, 2)).status == TMD_ERROR_ENGINE);
  CHECK(has(context.error(), "made by: tmd-engine 0.0.1 there, tmd-engine "));
}

TEST_CASE("a damaged plan is refused, and the cache serves in its place and says so") {
  const Disk disk;
  disk.make_folder(all());
  const std::string file = disk.plans_path() + "/backbone.plan";
  for (const char* content : {"short", ""}) {
    std::ofstream(file, std::ios::trunc) << content;
    tmd::Context context(TMD_TEST_BUNDLE, Options(disk, true));
    CHECK(context.try_generate(kPrompt, seeded(2, 2)).status == TMD_ERROR_ENGINE);
    CHECK(has(context.error(), "The plan " + file + " has " + std::to_string(std::string(content).size()) + " bytes"));
  }
  std::string same_size = std::string(TMD_TEST_BUNDLE) + "\nbackbone";
  same_size.back() = '!';
  std::ofstream(file, std::ios::trunc) << same_size;
  tmd::Context context(TMD_TEST_BUNDLE, Options(disk, true));
  CHECK(context.try_generate(kPrompt, seeded(2, 2)).status == TMD_ERROR_ENGINE);
  CHECK(has(context.error(), "The plan " + file + " is not what its manifest says (sha256)"));
  disk.cache({"backbone"});
  CHECK(context.generate(kPrompt, seeded(2, 2)).frames == on_the_cpu(seeded(2, 2)));
  CHECK(has(context.warnings(), "(sha256): copy the folder again.: taken from the cache\n"));
}

TEST_CASE("a folder that is none, and an engine that takes none") {
  const Disk disk;
  tmd::Context context;
  CHECK(context.try_open(TMD_TEST_BUNDLE, Options(disk, true)) == TMD_ERROR_ENGINE);
  CHECK(has(context.error(), disk.plans_path() + " is not a folder of plans ("));
  Options options(disk, true);
  options.engine = "onnxruntime";
  CHECK(context.try_open(TMD_TEST_BUNDLE, options) == TMD_ERROR_USAGE);
  CHECK(has(context.error(), "the engine onnxruntime takes no plans"));
}

TEST_CASE("one plan serves a range of sizes, and is loaded once") {
  for (const bool in_folder : {true, false}) {
    const Disk disk;
    std::vector<PlanOf> plans = all();
    for (PlanOf& plan : plans) {
      plan.size = kSmall;
      plan.up_to = kLarge;
      if (!in_folder) disk.cache(plan);
    }
    if (in_folder) disk.make_folder(plans);
    tmd::Context context(TMD_TEST_BUNDLE, Options(disk, in_folder));
    const int before = seen("deserialized");
    for (const Size size : {kSmall, kLarge, kSmall})
      CHECK(context.generate(kPrompt, sized(size)).frames == on_the_cpu(sized(size)));
    CHECK(seen("deserialized") - before == static_cast<int>(kGraphs.size()));
    CHECK(context.try_generate(kPrompt, sized({128, 64})).status == TMD_ERROR_ENGINE);
    if (in_folder) CHECK(has(context.error(), disk.plans_path() + " has no plan of tiny backbone for "));
  }
}

TEST_CASE("graphs share their scratch memory, which does not move where a folder says its largest") {
  const Disk disk;
  disk.make_folder(all(), 8 << 20);
  const int before = seen("scratches");
  tmd::Context context(TMD_TEST_BUNDLE, Options(disk, true));
  const int launched = seen("launches");
  for (int run = 0; run < 2; ++run) CHECK(context.generate(kPrompt, seeded(2, 2)).frames == on_the_cpu(seeded(2, 2)));
  CHECK(seen("scratches") - before <= 1);
  CHECK(seen("launches") - launched == 3);  // recorded once
}

TEST_CASE("steps are recorded anew when the scratch memory has moved") {
  const Disk disk;
  disk.cache_all();
  std::vector<PlanOf> larger = all();
  for (PlanOf& plan : larger) {
    plan.size = {96, 96};
    disk.cache(plan);
  }
  tmd::Context context(TMD_TEST_BUNDLE, Options(disk));
  tmd::Context clone = context.clone();
  const std::vector<std::uint8_t> expected = on_the_cpu(seeded(2, 2));
  CHECK(context.generate(kPrompt, seeded(2, 2)).frames == expected);
  CHECK(clone.generate(kPrompt, sized({96, 96})).frames == on_the_cpu(sized({96, 96})));
  const int launched = seen("launches");
  // The first step call by call, to record it once more, and the others launched. The stand-in ends the process where a
  // run has scratch memory that is gone.
  CHECK(context.generate(kPrompt, seeded(3, 2)).frames == on_the_cpu(seeded(3, 2)));
  CHECK(seen("launches") - launched == 2);
}

TEST_CASE("what ran goes on when somebody wants more scratch memory than there is") {
  const Disk disk;
  disk.cache_all();
  std::vector<PlanOf> larger = all();
  for (PlanOf& plan : larger) {
    plan.size = {96, 96};
    disk.cache(plan);
  }
  tmd::Context context(TMD_TEST_BUNDLE, Options(disk));
  tmd::Context clone = context.clone();
  const std::vector<std::uint8_t> expected = on_the_cpu(seeded(2, 2));
  CHECK(context.generate(kPrompt, seeded(2, 2)).frames == expected);
  {
    const Variable largest("FAKE_CUDA_LARGEST", "5000000");  // the decoder takes 3.2 MB, and 7.3 at the larger size
    CHECK(clone.try_generate(kPrompt, sized({96, 96})).status == TMD_ERROR_ENGINE);
    CHECK(has(clone.error(), "the GPU has no memory left"));
  }
  CHECK(context.generate(kPrompt, seeded(2, 2)).frames == expected);
}

TEST_CASE("the kernels that a card compiled are kept for the next process") {
  const Disk disk;
  disk.make_folder(all());
  for (int run = 0; run < 2; ++run) {
    const int before = seen("kernels");
    tmd::Context context(TMD_TEST_BUNDLE, Options(disk, true));
    CHECK(context.generate(kPrompt, seeded(2, 2)).frames == on_the_cpu(seeded(2, 2)));
    CHECK(seen("kernels") - before == (kForRtx && run ? static_cast<int>(kGraphs.size()) : 0));
    CHECK(kernels_in(disk).size() == (kForRtx ? kGraphs.size() : 0));
  }
  for (const std::string& line : kernels_in(disk)) {
    CHECK(has(line, "\"device\": \"Fake GPU\""));
    CHECK(has(line, "\"compute capability\": \"12.0\""));
    CHECK(has(line, "\"plan for\": \""));
  }
  // Others may write there: nothing of it is run, and nothing kept.
  for (const fs::path& path : disk.entries()) fs::remove(path);
  fs::permissions(disk.cache_path() + "/tensorrt", fs::perms::all);
  tmd::Context context(TMD_TEST_BUNDLE, Options(disk, true));
  CHECK(context.generate(kPrompt, seeded(2, 2)).frames == on_the_cpu(seeded(2, 2)));
  CHECK(disk.entries().empty());
}

TEST_CASE("what cannot be recorded runs step by step, and the reason is told once") {
  const Disk disk;
  disk.make_folder(all());
  const Variable not_capturable("FAKE_TENSORRT_NOT_CAPTURABLE", "1");
  tmd::Context context(TMD_TEST_BUNDLE, Options(disk, true));
  const int launched = seen("launches");
  CHECK(context.generate(kPrompt, seeded(3, 2)).frames == on_the_cpu(seeded(3, 2)));
  CHECK(has(context.warnings(), "steps are launched one by one, not as one CUDA graph: "));
  if (kForRtx) CHECK(has(context.warnings(), "TensorRT for RTX says that runs of this graph cannot be recorded\n"));
  CHECK(context.generate(kPrompt, seeded(3, 2)).frames == on_the_cpu(seeded(3, 2)));
  CHECK(context.warnings().empty());
  CHECK(seen("launches") == launched);
}

TEST_CASE("the library says before it loads a plan that this card cannot run it") {
  if (!kForRtx) return;
  const Disk disk;
  std::vector<PlanOf> plans = all();
  plans[0].content = "for another card";
  disk.make_folder(plans);
  tmd::Context context(TMD_TEST_BUNDLE, Options(disk, true));
  CHECK(context.try_generate(kPrompt, seeded(2, 2)).status == TMD_ERROR_ENGINE);
  CHECK(
      has(context.error(), "TensorRT for RTX " + kVersion +
                               " refuses the plan: it is for other compute capabilities and the driver is too old, or "
                               "there is none. In the cache there is no plan"));
}

TEST_CASE("auto leaves cards of servers to TensorRT, and a name is a name") {
  const Variable card("FAKE_CUDA_CAPABILITY", "9.0");
  const Disk disk;
  Options options(disk);
  options.engine = "auto";
  options.device = "cuda";
  tmd::Context context;
  const tmd_status status = context.try_open(TMD_TEST_BUNDLE, options);
  if (kForRtx) {
    CHECK(status == TMD_ERROR_ENGINE);
    CHECK(has(context.error(), "TensorRT for RTX is for cards of consumers, and Fake GPU has compute capability 9.0"));
  } else {
    CHECK(status == TMD_OK);
  }
  CHECK(context.try_open(TMD_TEST_BUNDLE, Options(disk)) == TMD_OK);
}
