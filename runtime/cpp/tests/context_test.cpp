// Whole runs of the built-in bundle through the public interface, on a real engine.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <tmd/tmd.hpp>

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <set>
#include <thread>

namespace fs = std::filesystem;

namespace {

constexpr const char* kPrompt = "a red circle moving right on a black background";

// The engine under test: "openvino", "onnxruntime".
const char* tested_engine() {
  const char* named = std::getenv("TMD_TEST_ENGINE");
  return named ? named : "auto";
}

tmd::OpenOptions one_thread() {
  tmd::OpenOptions options;
  options.engine = tested_engine();
  options.threads = 1;
  return options;
}

tmd::RunOptions seeded(std::int64_t seed = 1) {
  tmd::RunOptions options;
  options.seed = seed;
  return options;
}

long resident_kilobytes() {
  std::ifstream file("/proc/self/statm");
  long total = 0, resident = 0;
  file >> total >> resident;
  return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

// A private copy of the bundle, removed at the end.
struct Copy {
  fs::path folder = fs::temp_directory_path() / ("tmd-test-" + std::to_string(getpid()));
  Copy() {
    fs::remove_all(folder);
    fs::copy(TMD_TEST_BUNDLE, folder);
  }
  ~Copy() { fs::remove_all(folder); }
};

// The context that most tests share: opening is dear where a sanitizer watches.
tmd::Context& shared() {
  static tmd::Context context(TMD_TEST_BUNDLE, one_thread());
  return context;
}

const tmd::Video& expected() {
  static const tmd::Video video = shared().generate(kPrompt, seeded());
  return video;
}

}  // namespace

TEST_CASE("a bundle describes itself") {
  const tmd::Description d = shared().describe();
  CHECK(std::string(d.name) == "tiny");
  CHECK(std::string(d.family) == "tmd");
  CHECK(std::string(d.architecture) != d.family);
  CHECK(std::string(d.rule) == "euler");
  CHECK(std::string(d.engine) == tested_engine());
  CHECK(std::string(d.engine_version).size() > 3);
  CHECK((d.can_encode && d.can_denoise && d.can_decode));
  CHECK(d.allowed_steps[d.allowed_steps_count - 1] >= d.steps);
  const tmd::Plan plan = shared().plan();
  CHECK(plan.frames_size == std::size_t(3 * plan.frames * plan.width * plan.height));
  CHECK(plan.frames == (plan.latent_frames - 1) * d.temporal_stride + 1);
}

TEST_CASE("the same seed gives the same video, another seed another one") {
  CHECK(shared().generate(kPrompt, seeded()).frames == expected().frames);
  CHECK(shared().generate(kPrompt, seeded(2)).frames != expected().frames);
  const tmd::Video drawn = shared().generate(kPrompt);
  CHECK(drawn.result.seed >= 0);
  CHECK(shared().generate(kPrompt, seeded(drawn.result.seed)).frames == drawn.frames);
}

TEST_CASE("pieces, stages and low memory give the same frames as one call") {
  tmd::RunOptions options = seeded();
  std::vector<std::uint8_t> pieces;
  options.pieces = [&](const tmd::Piece& piece) {
    CHECK(piece.first * piece.width * piece.height * 3 == std::int32_t(pieces.size()));
    pieces.insert(pieces.end(), piece.frames, piece.frames + piece.count * piece.width * piece.height * 3);
    return true;
  };
  CHECK(shared().generate(kPrompt, options, false).frames.empty());
  CHECK(pieces == expected().frames);

  const tmd::Latents latents = shared().denoise(shared().encode(kPrompt), seeded());
  CHECK(shared().decode(latents).frames == expected().frames);
  std::vector<float> broken = shared().encode(kPrompt);
  broken[7] = NAN;
  CHECK(shared().try_denoise(broken, seeded()).status == TMD_ERROR_USAGE);

  tmd::OpenOptions low = one_thread();
  low.memory = TMD_MEMORY_LOW;
  tmd::Context frugal(TMD_TEST_BUNDLE, low);
  for (int run = 0; run < 2; ++run) {
    const tmd::Video video = frugal.generate(kPrompt, seeded());
    CHECK(video.frames == expected().frames);
    CHECK(video.result.seconds[TMD_STAGE_LOAD] > 0);  // every run is cold
  }
}

TEST_CASE("a run can be stopped in every stage, and the context goes on") {
  shared().unload();  // so that loading reports too
  std::set<tmd_stage> seen;
  for (const tmd_stage stage :
       {TMD_STAGE_LOAD, TMD_STAGE_TEXT, TMD_STAGE_BACKBONE, TMD_STAGE_FLOW_HEAD, TMD_STAGE_DECODE}) {
    tmd::RunOptions options = seeded();
    double before = 0;
    options.progress = [&](const tmd_progress& p) {
      CHECK(p.fraction >= before);
      CHECK((p.step >= 1 && p.step <= p.total));
      before = p.fraction;
      seen.insert(p.stage);
      return p.stage != stage;
    };
    const auto stopped = shared().try_generate(kPrompt, options);
    CHECK(stopped.status == TMD_CANCELLED);
    CHECK(shared().error().find(tmd_stage_name(stage)) != std::string::npos);
  }
  CHECK(seen.size() == 5);
  tmd::RunOptions options = seeded();
  options.pieces = [](const tmd::Piece& piece) { return piece.first == 0; };
  CHECK(shared().try_generate(kPrompt, options).status == TMD_CANCELLED);
  CHECK(shared().generate(kPrompt, seeded()).frames == expected().frames);
}

TEST_CASE("another thread stops a run at any moment, and the context goes on") {
  const std::vector<std::uint8_t> frames = expected().frames;
  shared().cancel();  // nothing runs: it is not meant for the next call
  CHECK(shared().generate(kPrompt, seeded()).frames == frames);
  std::atomic<bool> done{false};
  int stopped = 0;
  std::thread other([&] {
    for (int wait = 0; !done; wait = (wait + 7) % 60) {
      std::this_thread::sleep_for(std::chrono::milliseconds(wait));
      shared().cancel();
    }
  });
  for (int run = 0; run < 12; ++run) {
    const auto video = shared().try_generate(kPrompt, seeded());
    stopped += video.status == TMD_CANCELLED;
    CHECK((video.status == TMD_CANCELLED || video.value.frames == frames));
  }
  done = true;
  other.join();
  CHECK(stopped > 0);
  CHECK(shared().generate(kPrompt, seeded()).frames == frames);
}

TEST_CASE("an exception of a callback comes out of the throwing functions") {
  tmd::RunOptions options = seeded();
  options.progress = [](const tmd_progress&) -> bool { throw std::out_of_range("mine"); };
  CHECK_THROWS_AS(shared().generate(kPrompt, options), std::out_of_range);
  CHECK(shared().try_generate(kPrompt, options).status == TMD_CANCELLED);
}

TEST_CASE("outputs are untouched by what fails") {
  const tmd::Plan plan = shared().plan(seeded());
  std::vector<std::uint8_t> frames(plan.frames_size, 77);
  const std::vector<std::uint8_t> untouched = frames;
  tmd::RunOptions options = seeded();
  struct {
    int calls = 0;
  } counter;
  options.user = &counter;
  options.on_progress = [](void* user, const tmd_progress* p) {
    ++static_cast<decltype(counter)*>(user)->calls;
    return p->stage == TMD_STAGE_DECODE && p->step == p->total ? 1 : 0;  // at the very last moment
  };
  tmd_context* c = shared().get();
  CHECK(tmd_generate(c, kPrompt, &options, frames.data(), frames.size(), nullptr) == TMD_CANCELLED);
  CHECK((counter.calls > 5 && frames == untouched));
  CHECK(tmd_generate(c, kPrompt, nullptr, frames.data(), frames.size() - 1, nullptr) == TMD_ERROR_USAGE);
  CHECK(tmd_generate(c, kPrompt, nullptr, nullptr, 0, nullptr) == TMD_ERROR_USAGE);
  CHECK(tmd_generate(c, " ", nullptr, frames.data(), frames.size(), nullptr) == TMD_ERROR_USAGE);
  CHECK(tmd_open(c, "/no/such/bundle", nullptr) == TMD_ERROR_BUNDLE);
  CHECK(frames == untouched);
  CHECK(shared().generate(kPrompt, seeded()).frames == expected().frames);  // the old bundle is still open
}

TEST_CASE("wishes that the bundle does not allow are refused before any work") {
  const auto status = [](const tmd::RunOptions& options) { return shared().try_plan(options).status; };
  const auto with = [](auto set) {
    tmd::RunOptions options = seeded();
    set(options);
    return options;
  };
  CHECK(status(with([](tmd::RunOptions&) {})) == TMD_OK);
  for (const tmd::RunOptions& options :
       {with([](tmd::RunOptions& o) { o.steps = 999; }), with([](tmd::RunOptions& o) { o.inner_steps = 0; }),
        with([](tmd::RunOptions& o) { o.frames = 16; }), with([](tmd::RunOptions& o) { o.frames = -7; }),
        with([](tmd::RunOptions& o) { o.width = 64; }), with([](tmd::RunOptions& o) { o.width = o.height = 65; }),
        with([](tmd::RunOptions& o) { o.width = o.height = 1 << 30; }),
        with([](tmd::RunOptions& o) { o.guidance = 5; }), with([](tmd::RunOptions& o) { o.negative_prompt = "x"; }),
        with([](tmd::RunOptions& o) { o.seed = -2; })})
    CHECK(status(options) == TMD_ERROR_USAGE);
}

TEST_CASE("a context in use says so, from other threads and from its own callbacks") {
  tmd::RunOptions options = seeded();
  std::atomic<int> other{-1};
  tmd_status inner = TMD_OK;
  options.progress = [&](const tmd_progress&) {
    inner = tmd_unload(shared().get());
    std::thread([&] { other = shared().try_describe().status; }).join();
    return true;
  };
  CHECK(shared().generate(kPrompt, options).frames == expected().frames);
  CHECK(inner == TMD_ERROR_BUSY);
  CHECK(other == TMD_ERROR_BUSY);
}

TEST_CASE("clones run at the same time on the same weights and give the same frames") {
  const std::vector<std::uint8_t> frames = expected().frames;
  std::vector<std::future<bool>> runs;
  for (int i = 0; i < 3; ++i)
    runs.push_back(std::async(std::launch::async, [&frames, clone = std::make_shared<tmd::Context>(shared().clone())] {
      bool same = true;
      for (int run = 0; run < 2; ++run) same = same && clone->generate(kPrompt, seeded()).frames == frames;
      return same;
    }));
  for (auto& run : runs) CHECK(run.get());
}

TEST_CASE("the order of freeing does not matter, and a clone keeps what it needs") {
  auto first = std::make_unique<tmd::Context>(TMD_TEST_BUNDLE, one_thread());
  tmd::Context clone = first->clone();
  CHECK(first->generate(kPrompt, seeded()).frames == expected().frames);
  first.reset();
  CHECK(clone.generate(kPrompt, seeded()).frames == expected().frames);
}

TEST_CASE("a Transition Model: a still in any number of steps, seen on the way, from noise or from a picture") {
  tmd::Context context(TMD_TEST_STILLS, one_thread());
  const tmd::Description d = context.describe();
  CHECK(std::string(d.family) == "tim");
  CHECK((d.can_encode_image && d.allowed_steps == nullptr && d.classes == 0));
  tmd::RunOptions options = seeded();
  options.steps = 3;
  std::vector<std::vector<std::uint8_t>> seen;
  options.previews = [&](const tmd::Piece& piece) {
    seen.emplace_back(piece.frames, piece.frames + piece.count * piece.width * piece.height * 3);
    return true;
  };
  const tmd::Video still = context.generate(kPrompt, options);
  CHECK(still.times == std::vector<double>{1.0, 1 - 1.0 / 3, 1 - 2.0 / 3, 0.0});
  CHECK((still.result.steps == 3 && still.plan.frames == 1 && seen.size() == 2 && seen[0] != still.frames));
  options.steps = 1;
  CHECK(context.generate(kPrompt, options).frames == seen[0]);  // a jump from the start is the run of one step

  options.steps = 3;
  options.previews = nullptr;
  const tmd::Latents latents = context.denoise(context.encode(kPrompt), options);
  CHECK((latents.times == still.times && context.decode(latents).frames == still.frames));

  // The picture's own latents, hardly changed; a different one where everything changes.
  const std::vector<float> init = context.encode_image(still.frames.data(), still.plan.width, still.plan.height);
  options.init_latents = init.data();
  options.strength = 0.05;
  const auto distance = [&](const tmd::Video& video) {
    double sum = 0;
    for (std::size_t k = 0; k < video.frames.size(); ++k) sum += std::abs(int(video.frames[k]) - int(still.frames[k]));
    return sum / double(video.frames.size());
  };
  const double near = distance(context.generate("a green square on a gray background", options));
  options.strength = 1;
  CHECK(near < 20);
  CHECK(distance(context.generate("a green square on a gray background", options)) > 2 * near);

  tmd::RunOptions hurried = seeded();
  hurried.deadline = 1e-6;
  CHECK(context.generate(kPrompt, hurried).times == std::vector<double>{1.0, 0.0});
  hurried.deadline = 1000;  // s, for steps that take milliseconds
  hurried.steps = 5;
  const tmd::Video taken = context.generate(kPrompt, hurried);
  tmd::RunOptions again = seeded();
  again.schedule = taken.times.data();
  again.schedule_count = std::int32_t(taken.times.size());
  CHECK((taken.result.steps == 5 && context.generate(kPrompt, again).frames == taken.frames));

  // It can be stopped, also by its previews, and clones give the same.
  tmd::RunOptions stopped = seeded();
  stopped.previews = [](const tmd::Piece&) { return false; };
  CHECK(context.try_generate(kPrompt, stopped).status == TMD_CANCELLED);
  stopped.previews = [](const tmd::Piece&) -> bool { throw std::out_of_range("mine"); };
  CHECK_THROWS_AS(context.generate(kPrompt, stopped), std::out_of_range);
  tmd::RunOptions plain = seeded();
  plain.steps = 3;
  tmd::Context clone = context.clone();
  std::future<tmd::Video> other = std::async(std::launch::async, [&] { return clone.generate(kPrompt, plain); });
  CHECK(context.generate(kPrompt, plain).frames == still.frames);
  CHECK(other.get().frames == still.frames);
}

TEST_CASE("what is for Transition Models is refused by others") {
  const auto status = [](auto set) {
    tmd::RunOptions options = seeded();
    set(options);
    return shared().try_plan(options).status;
  };
  const double times[] = {1, 0};
  CHECK(status([&](tmd::RunOptions& o) { o.schedule = times, o.schedule_count = 2; }) == TMD_ERROR_USAGE);
  CHECK(status([](tmd::RunOptions& o) { o.deadline = 1; }) == TMD_ERROR_USAGE);
  CHECK(status([](tmd::RunOptions& o) { o.rho = 0.5; }) == TMD_ERROR_USAGE);
  CHECK(status([](tmd::RunOptions& o) { o.strength = 0.5; }) == TMD_ERROR_USAGE);
  CHECK(status([](tmd::RunOptions& o) { o.label = 1; }) == TMD_ERROR_USAGE);
}

TEST_CASE("files that are missing or damaged are one sentence") {
  Copy copy;
  for (const char* name : {"manifest.json", "backbone.onnx", "backbone.onnx.data", "tokenizer.model"}) {
    fs::rename(copy.folder / name, copy.folder / "away");
    tmd::Context context;
    CHECK(context.try_open(copy.folder.string()) == TMD_ERROR_BUNDLE);
    CHECK(context.error().find(std::string(name) + " is missing") != std::string::npos);
    fs::rename(copy.folder / "away", copy.folder / name);
  }
  // Gone after it was opened: the stage that needs it says so.
  tmd::Context context(copy.folder.string(), one_thread());
  fs::remove(copy.folder / "flow_head.onnx");
  CHECK(context.try_generate(kPrompt, seeded()).status == TMD_ERROR_BUNDLE);
  CHECK(context.error().find("flow_head.onnx is missing") != std::string::npos);
}

TEST_CASE("an engine that is not there is an error, not an end") {
  tmd::Context context;
  tmd::OpenOptions options;
  options.engine_library = "/no/such/libopenvino_c.so";
  CHECK(context.try_open(TMD_TEST_BUNDLE, options) == TMD_ERROR_ENGINE);
  CHECK(context.error().find("/no/such/libopenvino_c.so") != std::string::npos);
  options = tmd::OpenOptions();
  options.engine = "magic";
  CHECK(context.try_open(TMD_TEST_BUNDLE, options) == TMD_ERROR_USAGE);
  options = tmd::OpenOptions();
  options.device = "gpu";
  CHECK(context.try_open(TMD_TEST_BUNDLE, options) == TMD_ERROR_USAGE);
}

TEST_CASE("callers with smaller structs get what they know of") {
  // A program of an older header: its plan ends after `fps`.
  struct Old {
    std::size_t struct_size;
    std::int32_t steps, inner_steps, frames, width, height, fps;
    unsigned char beyond[64];
  } old{};
  std::memset(old.beyond, 77, sizeof old.beyond);
  old.struct_size = offsetof(Old, beyond);
  CHECK(tmd_plan_run(shared().get(), nullptr, reinterpret_cast<tmd_plan*>(&old)) == TMD_OK);
  CHECK(old.frames == shared().plan().frames);
  CHECK(old.struct_size == offsetof(Old, beyond));
  for (const unsigned char byte : old.beyond) CHECK(byte == 77);
}

TEST_CASE("opening and closing 100 times keeps memory where it was") {
  const auto cycle = [] {
    tmd::Context context(TMD_TEST_BUNDLE, one_thread());
    context.encode(kPrompt);
  };
  for (int i = 0; i < 20; ++i) cycle();
  const long before = resident_kilobytes();
  for (int i = 0; i < 100; ++i) cycle();
  const long growth = resident_kilobytes() - before;
  MESSAGE("growth over 100 cycles: " << growth << " kB");
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // those keep freed memory on purpose
  CHECK(growth < 20000);  // a leaked text encoder would be 100 times 0.7 MB, a leaked bundle more
#endif
}
