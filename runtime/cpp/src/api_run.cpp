// The C functions that run something.
#include <functional>

#include "context.hpp"

namespace tmd::internal {
namespace {

tmd_run_options options_of(const tmd_run_options* given) {
  return read_options(given, tmd_run_options_init, "tmd_run_options_init");
}

std::size_t frames_size(const Settings& s) { return static_cast<std::size_t>(s.frames * s.height * s.width * 3); }

std::size_t latents_count(const Settings& s) {
  return static_cast<std::size_t>(s.channels * s.latent_frames * s.latent_height * s.latent_width);
}

std::size_t embeds_count(const Manifest& manifest) {
  return static_cast<std::size_t>(manifest.text.max_length * manifest.text.dim);
}

void need_room(const char* what, std::size_t have, std::size_t need, const char* unit) {
  if (have < need)
    refuse_usage(std::string("the buffer for ") + what + " has " + std::to_string(have) + " " + unit + " and needs " +
                 std::to_string(need) + ": see tmd_plan_run.");
}

// Steps that a call will report, for the fraction.
std::int64_t denoise_steps(const Settings& s) { return s.steps * (1 + s.inner_steps) * s.passes(); }

void write_result(tmd_result* out, std::int64_t seed, const Progress& progress, std::int32_t dropped) {
  if (!out) return;
  tmd_result result;
  tmd_result_init(&result);
  result.seed = seed;
  for (int stage = 0; stage < TMD_STAGES; ++stage)
    result.seconds[stage] = progress.seconds(static_cast<tmd_stage>(stage));
  result.dropped_tokens = dropped;
  write_struct(out, result);
}

// Hands pieces to the callback, and keeps them if the caller wants the whole video at the end.
class Frames {
 public:
  Frames(const tmd_run_options& options, std::uint8_t* out, std::size_t size, std::int64_t width, std::int64_t height)
      : options_(options), out_(out), width_(width), height_(height), whole_(out ? size : 0) {
    if (!out && !options.on_frames)
      refuse_usage("there is no buffer for frames and no on_frames: the video has nowhere to go.");
  }

  void operator()(const std::uint8_t* rgb, std::int64_t first, std::int64_t count) {
    const auto picture = static_cast<std::size_t>(width_ * height_ * 3);
    if (out_)
      std::memcpy(&whole_[static_cast<std::size_t>(first) * picture], rgb, static_cast<std::size_t>(count) * picture);
    if (!options_.on_frames) return;
    const auto narrow = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
    if (options_.on_frames(options_.user, rgb, narrow(first), narrow(count), narrow(width_), narrow(height_)) != 0)
      throw Error(TMD_CANCELLED, "the run was stopped by on_frames.");
  }

  // Only a whole video reaches the caller's buffer.
  void finish() const {
    if (out_) std::memcpy(out_, whole_.data(), whole_.size());
  }

 private:
  const tmd_run_options& options_;
  std::uint8_t* out_;
  std::int64_t width_, height_;
  std::vector<std::uint8_t> whole_;
};

}  // namespace
}  // namespace tmd::internal

using namespace tmd::internal;

void tmd_run_options_init(tmd_run_options* options) {
  if (!options) return;
  *options = {};
  options->struct_size = sizeof *options;
  options->seed = TMD_RANDOM_SEED;
  options->steps = options->inner_steps = TMD_DEFAULT;
  options->frames = options->width = options->height = TMD_DEFAULT;
  options->guidance = options->shift = TMD_DEFAULT;
}

void tmd_plan_init(tmd_plan* plan) {
  if (!plan) return;
  *plan = {};
  plan->struct_size = sizeof *plan;
}

void tmd_result_init(tmd_result* result) {
  if (!result) return;
  *result = {};
  result->struct_size = sizeof *result;
}

tmd_status tmd_plan_run(tmd_context* context, const tmd_run_options* given, tmd_plan* plan) {
  return guarded(context, [&] {
    if (!plan) refuse_usage("the place for the plan is NULL.");
    check_struct(plan, "tmd_plan_init");
    const Manifest& manifest = opened(context).manifest();
    const Settings settings = resolve_settings(manifest, options_of(given));
    const auto narrow = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
    tmd_plan out;
    tmd_plan_init(&out);
    out.steps = narrow(settings.steps);
    out.inner_steps = narrow(settings.inner_steps);
    out.frames = narrow(settings.frames);
    out.width = narrow(settings.width);
    out.height = narrow(settings.height);
    out.fps = narrow(settings.fps);
    out.channels = narrow(settings.channels);
    out.latent_frames = narrow(settings.latent_frames);
    out.latent_height = narrow(settings.latent_height);
    out.latent_width = narrow(settings.latent_width);
    out.frames_size = frames_size(settings);
    out.latents_count = latents_count(settings);
    out.embeds_count = embeds_count(manifest);
    out.nfe = settings.nfe;
    context->warnings = settings.warnings;
    write_struct(plan, out);
  });
}

tmd_status tmd_generate(tmd_context* context, const char* prompt, const tmd_run_options* given, uint8_t* frames,
                        size_t size, tmd_result* result) {
  return guarded(context, [&] {
    if (!prompt) refuse_usage("the prompt is NULL: describe the video in a few words.");
    check_struct(result, "tmd_result_init");
    Pipeline& pipeline = opened(context);
    const tmd_run_options options = options_of(given);
    const Settings settings = resolve_settings(pipeline.manifest(), options);
    if (frames) need_room("frames", size, frames_size(settings), "bytes");
    Frames pieces(options, frames, frames_size(settings), settings.width, settings.height);
    std::string warnings = settings.warnings;
    pipeline.prepare({settings.latent_frames, settings.latent_height, settings.latent_width}, warnings);
    Progress progress(options.on_progress, options.user,
                      settings.passes() + denoise_steps(settings) + settings.latent_frames);
    std::int32_t dropped = 0;
    const bool guided = settings.passes() == 2;
    const std::vector<float> embeds = pipeline.encode(prompt, progress, settings.passes(), warnings, &dropped);
    const float* negative = guided ? pipeline.encode_negative(settings.negative_prompt, progress).data() : nullptr;
    const std::vector<float> latents =
        pipeline.denoise(embeds.data(), negative, pipeline.manifest().text.max_length, settings, progress);
    pipeline.decode(latents.data(), settings.latent_frames, settings.latent_height, settings.latent_width,
                    std::ref(pieces), progress);
    context->warnings = std::move(warnings);
    pieces.finish();
    write_result(result, settings.seed, progress, dropped);
  });
}

tmd_status tmd_tokenize(tmd_context* context, const char* prompt, int64_t* ids, size_t count, int32_t* dropped) {
  return guarded(context, [&] {
    if (!prompt || !ids) refuse_usage("the prompt or the place for its ids is NULL.");
    const Pipeline& pipeline = opened(context);
    need_room("ids", count, static_cast<std::size_t>(pipeline.manifest().text.max_length), "ids");
    const Tokens tokens = pipeline.tokenize(prompt);
    std::copy(tokens.ids.begin(), tokens.ids.end(), ids);
    if (dropped) *dropped = tokens.dropped;
  });
}

tmd_status tmd_encode(tmd_context* context, const char* prompt, float* embeds, size_t count, tmd_result* result) {
  return guarded(context, [&] {
    if (!prompt || !embeds) refuse_usage("the prompt or the place for its embeddings is NULL.");
    check_struct(result, "tmd_result_init");
    Pipeline& pipeline = opened(context);
    need_room("embeddings", count, embeds_count(pipeline.manifest()), "floats");
    Progress progress(nullptr, nullptr, 1);
    std::string warnings;
    std::int32_t dropped = 0;
    const std::vector<float> values = pipeline.encode(prompt, progress, 1, warnings, &dropped);
    context->warnings = std::move(warnings);
    std::copy(values.begin(), values.end(), embeds);
    write_result(result, 0, progress, dropped);
  });
}

tmd_status tmd_denoise(tmd_context* context, const float* embeds, const float* negative, int32_t tokens,
                       const tmd_run_options* given, float* latents, size_t count, tmd_result* result) {
  return guarded(context, [&] {
    if (!embeds || !latents) refuse_usage("the embeddings or the place for the latents is NULL.");
    check_struct(result, "tmd_result_init");
    Pipeline& pipeline = opened(context);
    const tmd_run_options options = options_of(given);
    const Settings settings = resolve_settings(pipeline.manifest(), options);
    if (tokens < 1 || tokens > 65536)
      refuse_usage("embeddings of " + std::to_string(tokens) + " tokens cannot be used: give 1 to 65536.");
    if ((settings.passes() == 2) != (negative != nullptr))
      refuse_usage(negative ? "negative_embeds need guidance, and this run has none: leave them out, or set guidance."
                            : "this run has guidance, which needs negative_embeds: give them, or set guidance to 1.");
    need_room("latents", count, latents_count(settings), "floats");
    std::string warnings = settings.warnings;
    pipeline.prepare({settings.latent_frames, settings.latent_height, settings.latent_width}, warnings);
    Progress progress(options.on_progress, options.user, denoise_steps(settings));
    const std::vector<float> values = pipeline.denoise(embeds, negative, tokens, settings, progress);
    context->warnings = std::move(warnings);
    std::copy(values.begin(), values.end(), latents);
    write_result(result, settings.seed, progress, 0);
  });
}

tmd_status tmd_decode(tmd_context* context, const float* latents, int32_t latent_frames, int32_t latent_height,
                      int32_t latent_width, const tmd_run_options* given, uint8_t* frames, size_t size,
                      tmd_result* result) {
  return guarded(context, [&] {
    if (!latents) refuse_usage("the latents are NULL.");
    check_struct(result, "tmd_result_init");
    Pipeline& pipeline = opened(context);
    const tmd_run_options options = options_of(given);
    const LatentInfo& geometry = pipeline.manifest().latents;
    constexpr std::int32_t kMost = 65536;
    for (const std::int32_t length : {latent_frames, latent_height, latent_width})
      if (length < 1 || length > kMost)
        refuse_usage("latents of such a size cannot be decoded: every length must be 1 to 65536.");
    const std::int64_t count = (std::int64_t{latent_frames} - 1) * geometry.temporal_stride + 1;
    const std::int64_t height = latent_height * geometry.spatial_stride, width = latent_width * geometry.spatial_stride;
    std::size_t need = 0;
    if (__builtin_mul_overflow(static_cast<std::size_t>(count), static_cast<std::size_t>(height * width * 3), &need))
      throw std::bad_alloc();
    if (frames) need_room("frames", size, need, "bytes");
    Frames pieces(options, frames, need, width, height);
    std::string warnings;
    pipeline.prepare({latent_frames, latent_height, latent_width}, warnings);
    Progress progress(options.on_progress, options.user, latent_frames);
    pipeline.decode(latents, latent_frames, latent_height, latent_width, std::ref(pieces), progress);
    pieces.finish();
    context->warnings = std::move(warnings);
    write_result(result, 0, progress, 0);
  });
}
