// tmd for C++17: owners for what tmd.h hands out. Header only, no interface of its own to the library.
//
//     tmd::Context context("my-bundle");
//     tmd::RunOptions options;
//     options.seed = 1;
//     options.progress = [](const tmd_progress& p) { return p.fraction < 2; };   // false stops the run
//     tmd::Video video = context.generate("a red circle moving right on a black background", options);
//     video.frames;                                                             // uint8 RGB [F, H, W, 3]
//
// Errors, by choice: every function throws tmd::Error, and its twin try_... throws nothing and returns a tmd::Expected.
// The rules of tmd.h hold. Exceptions thrown by callbacks stop the run and come out of the throwing functions; from the
// try_... functions they come back as TMD_CANCELLED.
#ifndef TMD_TMD_HPP
#define TMD_TMD_HPP

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tmd.h"

namespace tmd {

class Error : public std::runtime_error {
 public:
  Error(tmd_status status, const std::string& text) : std::runtime_error(text), status_(status) {}
  tmd_status status() const noexcept { return status_; }

 private:
  tmd_status status_;
};

// A value, or the reason why there is none.
template <typename T>
struct Expected {
  tmd_status status = TMD_OK;
  T value{};
  explicit operator bool() const noexcept { return status == TMD_OK; }
};

struct OpenOptions : tmd_open_options {
  OpenOptions() { tmd_open_options_init(this); }
};

// A piece of the video, valid during the call: uint8 RGB [count, height, width, 3].
struct Piece {
  const std::uint8_t* frames;
  std::int32_t first, count, width, height;
};

struct RunOptions : tmd_run_options {
  RunOptions() { tmd_run_options_init(this); }
  std::function<bool(const tmd_progress&)> progress;  // false stops the run; empty: none
  std::function<bool(const Piece&)> pieces;           // false stops the run; empty: none
  std::function<bool(const Piece&)> previews;         // false stops the run; empty: none
};

struct Plan : tmd_plan {
  Plan() { tmd_plan_init(this); }
};

struct Description : tmd_description {
  Description() { tmd_description_init(this); }
};

struct Result : tmd_result {
  Result() { tmd_result_init(this); }
};

struct Video {
  std::vector<std::uint8_t> frames;  // RGB [plan.frames, plan.height, plan.width, 3]; empty if nobody wanted them whole
  Plan plan;
  Result result;
  std::vector<double> times;  // family "tim": the times that the run went through
};

struct Latents {
  std::vector<float> values;  // [plan.channels, plan.latent_frames, plan.latent_height, plan.latent_width]
  Plan plan;
  Result result;
  std::vector<double> times;  // family "tim": the times that the run went through
};

// One thread at a time; move-only.
class Context {
 public:
  Context() {
    tmd_context* made = nullptr;
    if (tmd_create(&made) != TMD_OK) throw std::bad_alloc();
    context_.reset(made);
  }
  explicit Context(const std::string& bundle, const OpenOptions& options = OpenOptions()) : Context() {
    open(bundle, options);
  }

  tmd_context* get() const noexcept { return context_.get(); }
  std::string error() const { return tmd_error(get()); }
  std::string warnings() const { return tmd_warnings(get()); }

  void open(const std::string& bundle, const OpenOptions& options = OpenOptions()) { check(try_open(bundle, options)); }
  tmd_status try_open(const std::string& bundle, const OpenOptions& options = OpenOptions()) noexcept {
    return tmd_open(get(), bundle.c_str(), &options);
  }

  // Stops the call that runs on this context, from any thread or from a handler of a signal; see tmd_cancel.
  void cancel() noexcept { tmd_cancel(get()); }

  Context clone() { return take(try_clone()); }
  Expected<Context> try_clone() noexcept {
    tmd_context* made = nullptr;
    const tmd_status status = tmd_clone(get(), &made);
    return {status, Context(made)};
  }

  Description describe() { return take(try_describe()); }
  Expected<Description> try_describe() noexcept {
    Expected<Description> out;
    out.status = tmd_describe(get(), &out.value);
    return out;
  }

  Plan plan(const RunOptions& options = RunOptions()) { return take(try_plan(options)); }
  Expected<Plan> try_plan(const RunOptions& options = RunOptions()) noexcept {
    Expected<Plan> out;
    out.status = tmd_plan_run(get(), &options, &out.value);
    return out;
  }

  // `whole` false: frames go to options.pieces only.
  Video generate(const std::string& prompt, const RunOptions& options = RunOptions(), bool whole = true) {
    return take(try_generate(prompt, options, whole));
  }
  Expected<Video> try_generate(const std::string& prompt, const RunOptions& options = RunOptions(),
                               bool whole = true) noexcept {
    return guarded<Video>([&](Video& video) {
      Calls calls(options, &thrown_);
      tmd_status status = tmd_plan_run(get(), &calls.options, &video.plan);
      if (status != TMD_OK) return status;
      if (whole) video.frames.resize(video.plan.frames_size);
      status = tmd_generate(get(), prompt.c_str(), &calls.options, whole ? video.frames.data() : nullptr,
                            video.frames.size(), &video.result);
      keep_times(video);
      return status;
    });
  }

  std::vector<float> encode(const std::string& prompt) { return take(try_encode(prompt)); }
  Expected<std::vector<float>> try_encode(const std::string& prompt) noexcept {
    return guarded<std::vector<float>>([&](std::vector<float>& embeds) {
      Description description;
      const tmd_status status = tmd_describe(get(), &description);
      if (status != TMD_OK) return status;
      embeds.resize(static_cast<std::size_t>(description.text_tokens) * static_cast<std::size_t>(description.text_dim));
      Result result;
      const tmd_status encoded = tmd_encode(get(), prompt.c_str(), embeds.data(), embeds.size(), &result);
      embeds.resize(static_cast<std::size_t>(result.tokens) * static_cast<std::size_t>(description.text_dim));
      return encoded;
    });
  }

  // A picture, uint8 [height, width, 3], to the latents for RunOptions::init_latents.
  std::vector<float> encode_image(const std::uint8_t* rgb, std::int32_t width, std::int32_t height) {
    return take(try_encode_image(rgb, width, height));
  }
  Expected<std::vector<float>> try_encode_image(const std::uint8_t* rgb, std::int32_t width,
                                                std::int32_t height) noexcept {
    return guarded<std::vector<float>>([&](std::vector<float>& latents) {
      Description of;
      const tmd_status status = tmd_describe(get(), &of);
      if (status != TMD_OK) return status;
      const auto length = [&](std::int32_t pixels) {
        return static_cast<std::size_t>(pixels < 0 ? 0 : pixels / of.spatial_stride);
      };
      latents.resize(static_cast<std::size_t>(of.channels) * length(width) * length(height));
      return tmd_encode_image(get(), rgb, width, height, latents.data(), latents.size(), nullptr);
    });
  }

  // Embeddings [tokens, text_dim]; `negative` is empty, or as large, for guidance. Both empty for a model of classes.
  Latents denoise(const std::vector<float>& embeds, const RunOptions& options = RunOptions(),
                  const std::vector<float>& negative = {}) {
    return take(try_denoise(embeds, options, negative));
  }
  Expected<Latents> try_denoise(const std::vector<float>& embeds, const RunOptions& options = RunOptions(),
                                const std::vector<float>& negative = {}) noexcept {
    return guarded<Latents>([&](Latents& latents) {
      Calls calls(options, &thrown_);
      Description description;
      tmd_status status = tmd_describe(get(), &description);
      if (status == TMD_OK) status = tmd_plan_run(get(), &calls.options, &latents.plan);
      if (status != TMD_OK) return status;
      if (!negative.empty() && negative.size() != embeds.size()) return TMD_ERROR_USAGE;
      latents.values.resize(latents.plan.latents_count);
      const auto tokens = static_cast<std::int32_t>(embeds.size() / static_cast<std::size_t>(description.text_dim));
      status =
          tmd_denoise(get(), embeds.empty() ? nullptr : embeds.data(), negative.empty() ? nullptr : negative.data(),
                      tokens, &calls.options, latents.values.data(), latents.values.size(), &latents.result);
      keep_times(latents);
      return status;
    });
  }

  Video decode(const Latents& latents, const RunOptions& options = RunOptions()) {
    return take(try_decode(latents, options));
  }
  Expected<Video> try_decode(const Latents& latents, const RunOptions& options = RunOptions()) noexcept {
    return guarded<Video>([&](Video& video) {
      Calls calls(options, &thrown_);
      video.plan = latents.plan;
      video.frames.resize(video.plan.frames_size);
      return tmd_decode(get(), latents.values.data(), video.plan.latent_frames, video.plan.latent_height,
                        video.plan.latent_width, &calls.options, video.frames.data(), video.frames.size(),
                        &video.result);
    });
  }

  void unload() { check(tmd_unload(get())); }

 private:
  struct Free {
    void operator()(tmd_context* context) const noexcept { tmd_free(context); }
  };

  // The C options with our trampolines in place of the function objects. No exception may pass through C.
  struct Calls {
    Calls(const RunOptions& given, std::exception_ptr* thrown) : options(given), functions(given), place(thrown) {
      *place = nullptr;
      options.user = this;
      options.on_progress = given.progress ? &Calls::on_progress : nullptr;
      options.on_frames = given.pieces ? &Calls::on_frames : nullptr;
      options.on_preview = given.previews ? &Calls::on_preview : nullptr;
    }
    template <typename Call>
    int stop_unless(const Call& call) noexcept {
      try {
        return call() ? 0 : 1;
      } catch (...) {
        *place = std::current_exception();
        return 1;
      }
    }
    static int on_progress(void* user, const tmd_progress* progress) {
      auto* self = static_cast<Calls*>(user);
      return self->stop_unless([&] { return self->functions.progress(*progress); });
    }
    static int on_frames(void* user, const std::uint8_t* frames, std::int32_t first, std::int32_t count,
                         std::int32_t width, std::int32_t height) {
      auto* self = static_cast<Calls*>(user);
      return self->stop_unless([&] { return self->functions.pieces({frames, first, count, width, height}); });
    }
    static int on_preview(void* user, const std::uint8_t* frames, std::int32_t first, std::int32_t count,
                          std::int32_t width, std::int32_t height) {
      auto* self = static_cast<Calls*>(user);
      return self->stop_unless([&] { return self->functions.previews({frames, first, count, width, height}); });
    }
    tmd_run_options options;
    const RunOptions& functions;
    std::exception_ptr* place;
  };

  // The pointer in the result lives until the next call only.
  template <typename Made>
  static void keep_times(Made& made) {
    if (!made.result.times) return;
    made.times.assign(made.result.times, made.result.times + made.result.times_count);
    made.result.times = nullptr;
  }

  explicit Context(tmd_context* made) noexcept : context_(made) {}

  template <typename T, typename Work>
  Expected<T> guarded(const Work& work) noexcept {
    Expected<T> out;
    try {
      out.status = work(out.value);
    } catch (...) {
      out.status = TMD_ERROR_MEMORY;  // a vector of ours did not fit
    }
    return out;
  }

  void check(tmd_status status) {
    if (status == TMD_OK) return;
    if (status == TMD_CANCELLED && thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
    throw Error(status, std::string(tmd_status_name(status)) + ": " + error());
  }
  template <typename T>
  T take(Expected<T> expected) {
    check(expected.status);
    return std::move(expected.value);
  }

  std::unique_ptr<tmd_context, Free> context_;
  std::exception_ptr thrown_;
};

}  // namespace tmd

#endif  // TMD_TMD_HPP
