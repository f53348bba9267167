// The engine tensorrt, and built again tensorrt-rtx, on a stand-in for NVIDIA's libraries (fake_tensorrt.cpp,
// fake_cuda.cpp): buffers copied, outer steps recorded; the frames are those of ONNX Runtime, which computes behind it.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <future>

#include "plans_on_disk.hpp"

TEST_CASE("frames are those of the engine behind it, and outer steps after the first are one launch each") {
  const Disk disk;
  disk.cache_all();
  tmd::Context context(TMD_TEST_BUNDLE, Options(disk));
  CHECK(std::string(context.describe().engine) == TMD_TEST_ENGINE);
  CHECK(std::string(context.describe().engine_version) == kVersion);
  int before = seen("launches");
  const auto launched = [&] {
    const int now = seen("launches"), more = now - before;
    before = now;
    return more;
  };
  CHECK(context.generate(kPrompt, seeded(2, 2)).frames == on_the_cpu(seeded(2, 2)));
  CHECK(launched() == 1);
  CHECK(context.generate(kPrompt, seeded(2, 2)).frames == on_the_cpu(seeded(2, 2)));
  CHECK(launched() == 1);  // the decoder came, and with it a larger piece of scratch memory
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
  const Disk disk;
  disk.cache_all();
  tmd::Context context(TMD_TEST_BUNDLE, Options(disk));
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
  const Disk disk;
  disk.cache_all();
  tmd::Context context(TMD_TEST_BUNDLE, Options(disk));
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
  const Disk disk;
  for (const char* graph : {"text_encoder", "backbone", "flow_head", "update", "decoder_first", "encoder"})
    for (const std::int64_t rows : {1, 2}) disk.cache({graph, {}, {}, TMD_TEST_STILLS, rows});
  tmd::Context context(TMD_TEST_STILLS, Options(disk));
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
  const Disk disk;
  tmd::Context context(TMD_TEST_BUNDLE, Options(disk));
  const auto said = [&] {
    CHECK(context.try_generate(kPrompt, seeded()).status == TMD_ERROR_ENGINE);
    return context.error();
  };
  CHECK(said().find("tmd-engine build BUNDLE --engine " TMD_TEST_ENGINE " --size") != std::string::npos);
  disk.cache({"text_encoder", {{"device", "Another GPU"}}});
  CHECK(said().find("for something else (device: Another GPU there, ") != std::string::npos);
  disk.cache({"text_encoder", {}, "no plan"});
  CHECK(said().find(kVersion + " refuses the plan: magic tag does not match.") != std::string::npos);
  disk.cache({"text_encoder", {}, TMD_TEST_BUNDLE "\nbackbone"});  // a plan of another graph under this key
  CHECK(said().find(kVersion + " refuses attention_mask of [1, ") != std::string::npos);
  disk.cache_all();
  CHECK(context.generate(kPrompt, seeded(2, 2)).frames == on_the_cpu(seeded(2, 2)));
}

TEST_CASE("devices and engines go together") {
  const Disk disk;
  Options options(disk);
  options.device = "cpu";
  tmd::Context context;
  CHECK(context.try_open(TMD_TEST_BUNDLE, options) == TMD_ERROR_USAGE);
  CHECK(context.error().find("the engine " TMD_TEST_ENGINE " runs on the device cuda, not on cpu") !=
        std::string::npos);
  options.device = "cuda";
  CHECK(context.try_open(TMD_TEST_BUNDLE, options) == TMD_OK);
  options.engine = "auto";
  CHECK(context.try_open(TMD_TEST_BUNDLE, options) == TMD_OK);
  CHECK(std::string(context.describe().engine) == TMD_TEST_ENGINE);
}
