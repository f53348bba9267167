// Answers about what lies around a run: who stops it, the host's locale, the machine's processors, folders that were left.
#include <clocale>
#include <chrono>
#include <thread>

#include <pthread.h>

#include <csignal>

#include "engines/cpu.hpp"
#include "engines/private_folder.hpp"
#include "twin_tools.hpp"

namespace twin {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

tmd_context* to_cancel = nullptr;
void on_signal(int) { tmd_cancel(to_cancel); }

// Decodes latents of zeros, one latent frame after the other in a graph each, and asks it to stop in the middle of the
// third, from another thread or from a handler of a signal. Says how long a whole graph took and how long it took to stop.
json stop(const json& question) {
  tmd_context* context = opened_for(question);
  const std::int32_t height = question.at("height"), width = question.at("width");
  tmd_description of;
  tmd_description_init(&of);
  check(context, tmd_describe(context, &of));
  const auto decode = [&](std::int32_t frames, const tmd_run_options& options) {
    const std::vector<float> latents(static_cast<std::size_t>(of.channels * frames * height * width));
    return tmd_decode(context, latents.data(), frames, height, width, &options, nullptr, 0, nullptr);
  };
  struct Watched {
    tmd_context* context;
    pthread_t runner;
    bool by_signal;
    double whole = 0;
    Clock::time_point asked{};
    std::thread stopper;
  } watched{context, ::pthread_self(), question.at("by_signal"), 0, {}, {}};
  to_cancel = context;
  struct sigaction action {};
  action.sa_handler = on_signal;
  ::sigaction(SIGUSR1, &action, nullptr);

  tmd_run_options options;
  tmd_run_options_init(&options);
  options.user = &watched;
  options.on_frames = [](void*, const std::uint8_t*, std::int32_t, std::int32_t, std::int32_t, std::int32_t) {
    return 0;
  };
  options.on_progress = [](void* user, const tmd_progress* progress) {
    auto* self = static_cast<Watched*>(user);
    if (progress->stage != TMD_STAGE_DECODE || progress->step != 2) return 0;
    self->whole = progress->seconds;
    self->stopper = std::thread([self] {
      std::this_thread::sleep_for(std::chrono::duration<double>(self->whole / 8));
      self->asked = Clock::now();
      if (self->by_signal)
        ::pthread_kill(self->runner, SIGUSR1);
      else
        tmd_cancel(self->context);
    });
    return 0;
  };
  const tmd_status status = decode(3, options);
  const double waited = seconds_since(watched.asked);
  if (watched.stopper.joinable()) watched.stopper.join();
  const std::string error = tmd_error(context);
  tmd_cancel(context);  // nothing runs: it is not meant for the next call
  options.on_progress = nullptr;
  check(context, decode(1, options));
  return {{"ok", status}, {"said", error}, {"whole", watched.whole}, {"waited", waited}};
}

// Seconds per stage of calls whose graphs are loaded for them, on the smallest latents: to run them takes no time.
json cold(const json& question) {
  tmd_context* context = opened_for(question);
  tmd_plan plan;
  tmd_plan_init(&plan);
  check(context, tmd_plan_run(context, nullptr, &plan));
  tmd_result result;
  const auto seconds = [&](tmd_status status) {
    check(context, status);
    check(context, tmd_unload(context));
    return json(std::vector<double>(result.seconds, result.seconds + TMD_STAGES));
  };
  json out;
  tmd_result_init(&result);
  constexpr std::int32_t kFrames = 2, kSide = 2;
  tmd_description of;
  tmd_description_init(&of);
  check(context, tmd_describe(context, &of));
  const std::int32_t pixels = kSide * of.spatial_stride, pictures = 1 + of.temporal_stride;
  std::vector<float> embeds(plan.embeds_count), latents(static_cast<std::size_t>(of.channels * kFrames * kSide * kSide));
  out["encode"] = seconds(tmd_encode(context, "a red circle", embeds.data(), embeds.size(), &result));
  tmd_result_init(&result);
  const std::int32_t latent_frames = question.at("picture") ? 1 : kFrames;
  std::vector<std::uint8_t> frames(static_cast<std::size_t>(pictures * pixels * pixels * 3));
  out["decode"] = seconds(tmd_decode(context, latents.data(), latent_frames, kSide, kSide, nullptr, frames.data(),
                                     frames.size(), &result));
  if (!question.at("picture")) return {{"ok", out}};
  tmd_result_init(&result);
  out["encode_image"] = seconds(
      tmd_encode_image(context, frames.data(), pixels, pixels, latents.data(), latents.size(), &result));
  return {{"ok", out}};
}

}  // namespace

json answer_about_machine(const json& question) {
  const std::string what = question.at("do");
  if (what == "stop") return stop(question);
  if (what == "cold") return cold(question);
  if (what == "locale") {  // of the whole process; its decimal point
    const std::string name = question.at("name");
    const char* set = std::setlocale(LC_ALL, name.c_str());
    return {{"ok", set ? json(std::localeconv()->decimal_point) : json()}};
  }
  if (what == "threads") {
    const std::string root = question.at("root");
    const std::optional<double> quota = cpu_quota(root);
    const Threads threads = resolve_threads(question.at("bytes"), question.at("wish"), root);
    return {{"ok", {threads.count, threads.note}},
            {"quota", quota ? json(*quota) : json()},
            {"cores", usable_cores(root)}};
  }
  if (what == "hold_folder") {  // until the twin ends
    static PrivateFolder folder;
    if (!folder.write("graph.onnx", "x")) return {{"error", "no folder"}};
    return {{"ok", folder.path("graph.onnx")}};
  }
  if (what == "sweep_folders") {
    sweep_private_folders(question.at("folder"));
    return {{"ok", true}};
  }
  return nullptr;
}

}  // namespace twin
