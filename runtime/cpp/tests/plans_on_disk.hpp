// Plans for the stand-in (fake_tensorrt.cpp) where the engines look for them: in a cache, or in a folder of plans.
#pragma once

#include <filesystem>
#include <string>

#include "engines/plan_key.hpp"
#include "tmd/tmd.hpp"

extern const std::string kVersion;  // of the stand-in: that of the headers

// A picture size; the default of the bundle where nothing is said.
struct Size {
  std::int64_t width = 0, height = 0;
};

struct PlanOf {
  std::string graph;
  tmd::internal::PlanKey changed = {};  // fields of the key that are other than they should be
  std::string content = {};             // in place of the plan
  std::string bundle = TMD_TEST_BUNDLE;
  std::int64_t rows = 1;
  Size size = {}, up_to = {};  // one size, or a range
};

// The graphs of the built-in model.
extern const std::vector<std::string> kGraphs;

// A new, empty folder with a cache and a folder of plans; gone with the object.
class Disk {
 public:
  Disk();
  Disk(const Disk&) = delete;
  Disk& operator=(const Disk&) = delete;
  ~Disk();

  // An entry as tmd-engine build leaves it in the cache.
  void cache(const PlanOf& plan) const;
  void cache_all() const;
  // A folder as tmd-engine build --out makes it; of all plans the `scratch` as the builder would say it.
  void make_folder(const std::vector<PlanOf>& plans, std::int64_t scratch = 0, const char* made_by = nullptr) const;

  std::string cache_path() const { return (folder_ / "cache").string(); }
  std::string plans_path() const { return (folder_ / "plans").string(); }
  std::vector<std::filesystem::path> entries() const;  // of the cache

 private:
  std::filesystem::path folder_;
};

struct Options : tmd::OpenOptions {
  explicit Options(const Disk& disk, bool with_folder = false);

 private:
  std::string cache_, plans_;
};

// Asks the stand-in: "launches" of fake_cuda, "deserialized", "kernels", "scratches" of fake_tensorrt.
int seen(const std::string& what);

tmd::RunOptions seeded(std::int32_t steps = TMD_DEFAULT, std::int32_t inner_steps = TMD_DEFAULT);

// The frames that ONNX Runtime gives.
std::vector<std::uint8_t> on_the_cpu(const tmd::RunOptions& run, const char* bundle = TMD_TEST_BUNDLE);

extern const char* const kPrompt;
