// The C functions that run something.
#include <functional>

#include "api/context.hpp"

namespace tmd::internal {
namespace {

tmd_run_options options_of(const tmd_run_options* given) {
  return read_options(given, tmd_run_options_init, "tmd_run_options_init");
}

std::size_t embeds_count(const Manifest& manifest) {
  return static_cast<std::size_t>(manifest.text.max_length * manifest.text.dim);
}

void need_room(const char* what, std::size_t have, std::size_t need, const char* unit) {
  if (have < need)
    refuse_usage(std::string("the buffer for ") + what + " has " + std::to_string(have) + " " + unit + " and needs " +
                 std::to_string(need) + ": see tmd_plan_run.");
}

tmd_result result_of(const Progress& progress) {
  tmd_result result;
  tmd_result_init(&result);
  for (int stage = 0; stage < TMD_STAGES; ++stage)
    result.seconds[stage] = progress.seconds(static_cast<tmd_stage>(stage));
  return result;
}

// Of a run through `times`, if its family tells them.
void write_result(tmd_result* out, tmd_context* context, const Settings& settings, const Progress& progress,
                  std::int32_t dropped, std::vector<double> times) {
  context->times = std::move(times);
  if (!out) return;
  tmd_result result = result_of(progress);
  result.seed = settings.seed;
  result.dropped_tokens = dropped;
  result.steps = static_cast<std::int32_t>(settings.steps);
  if (!context->times.empty()) {
    result.times = context->times.data();
    result.times_count = static_cast<std::int32_t>(context->times.size());
    result.steps = result.times_count - 1;
  }
  write_struct(out, result);
}

// What a run would like a person to know, and with it what its engine does.
void set_warnings(tmd_context* context, std::string warnings) {
  context->warnings = std::move(warnings) + context->pipeline->shared()->engine->take_notes();
}

LatentSize latent_size(const Manifest& manifest, const Settings& s) {
  return {s.latent_frames, s.latent_height, s.latent_width, family_of(manifest).rows(s)};
}

// Picture and previews of a run; throws unless picture and strength go together, or the picture and a video whose first
// frame it becomes.
Start start_of(Pipeline& pipeline, const tmd_run_options& options, const Settings& settings, Progress& progress) {
  const bool holds = pipeline.manifest().holds_first_frame();
  if (holds && options.init_latents && settings.frames == 1)
    refuse_usage("a video of one frame would be the picture itself: choose more frames, such as 81.");
  if (!holds && (options.init_latents != nullptr) != settings.strength.has_value())
    refuse_usage(settings.strength
                     ? "a strength says how much of a picture changes, and there is none: give init_latents."
                     : "to start from a picture, set a strength: 0.3 changes little of it, 1 everything.");
  Start start;
  start.picture = options.init_latents;
  if (start.picture &&
      !all_finite(start.picture, settings.latents_count() / static_cast<std::size_t>(settings.latent_frames)))
    refuse_usage("the picture's latents hold NaN or Inf: encode the picture again.");
  if (!options.on_preview) return start;
  if (pipeline.one_after_the_other())
    fail_run(
        "a preview needs the decoder beside the model, and only one stage after the other fits here (or was asked "
        "for): leave the preview out, or open with TMD_MEMORY_ALL.");
  start.on_preview = [&pipeline, &options, &settings, &progress](const float* latents) {
    Progress silent(nullptr, nullptr, 1);
    const auto show = [&](const std::uint8_t* rgb, std::int64_t first, std::int64_t count) {
      const auto narrow = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
      if (options.on_preview(options.user, rgb, narrow(first), narrow(count), narrow(settings.width),
                             narrow(settings.height)) != 0)
        throw Error(TMD_CANCELLED, "the run was stopped by on_preview.");
    };
    pipeline.decode(latents, settings.latent_frames, settings.latent_height, settings.latent_width, show, silent);
    for (const tmd_stage stage : {TMD_STAGE_LOAD, TMD_STAGE_DECODE}) progress.add(stage, silent.seconds(stage));
  };
  return start;
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
  options->label = TMD_DEFAULT;
  options->deadline = options->rho = options->strength = TMD_DEFAULT;
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
    out.frames_size = settings.frames_size();
    out.latents_count = settings.latents_count();
    out.embeds_count = embeds_count(manifest);
    out.nfe = settings.nfe;
    context->warnings = settings.warnings;
    write_struct(plan, out);
  });
}

tmd_status tmd_generate(tmd_context* context, const char* prompt, const tmd_run_options* given, uint8_t* frames,
                        size_t size, tmd_result* result) {
  return stoppable(context, [&] {
    check_struct(result, "tmd_result_init");
    Pipeline& pipeline = opened(context);
    const Manifest& manifest = pipeline.manifest();
    const tmd_run_options options = options_of(given);
    const Settings settings = resolve_settings(manifest, options);
    if (manifest.classes() && prompt && *prompt)
      refuse_usage("this model draws numbered classes and takes no prompt: leave the prompt out.");
    if (!manifest.classes() && !prompt) refuse_usage("the prompt is NULL: describe the video in a few words.");
    if (frames) need_room("frames", size, settings.frames_size(), "bytes");
    Frames pieces(options, frames, settings.frames_size(), settings.width, settings.height);
    std::string warnings = settings.warnings;
    pipeline.prepare(latent_size(manifest, settings), kText | kDenoise | kDecode, warnings);
    const std::int64_t decodes =
        pipeline.decode_steps(settings.latent_frames, settings.latent_height, settings.latent_width);
    Progress progress(options.on_progress, options.user,
                      pipeline.prompts(settings) + family_of(manifest).reported_steps(settings) + decodes);
    Start start = start_of(pipeline, options, settings, progress);
    std::int32_t dropped = 0;
    const Condition condition = pipeline.condition(prompt ? prompt : "", settings, progress, warnings, &dropped);
    start.embeds = condition.embeds.data();
    if (!condition.negative.empty()) start.negative = condition.negative.data();
    Denoised made = pipeline.denoise(start, condition.tokens, settings, progress);
    pipeline.decode(made.latents.data(), settings.latent_frames, settings.latent_height, settings.latent_width,
                    std::ref(pieces), progress);
    set_warnings(context, std::move(warnings));
    pieces.finish();
    write_result(result, context, settings, progress, dropped, std::move(made.times));
  });
}

tmd_status tmd_tokenize(tmd_context* context, const char* prompt, int64_t* ids, size_t count, int32_t* dropped) {
  return guarded(context, [&] {
    if (!prompt || !ids) refuse_usage("the prompt or the place for its ids is NULL.");
    const Pipeline& pipeline = opened(context);
    need_room("ids", count, static_cast<std::size_t>(pipeline.manifest().text.max_length), "ids");
    Tokens tokens = pipeline.tokenize(prompt);
    tokens.ids.resize(static_cast<std::size_t>(pipeline.manifest().text.max_length), pipeline.manifest().text.pad_id);
    std::copy(tokens.ids.begin(), tokens.ids.end(), ids);
    if (dropped) *dropped = tokens.dropped;
  });
}

tmd_status tmd_encode(tmd_context* context, const char* prompt, float* embeds, size_t count, tmd_result* result) {
  return stoppable(context, [&] {
    if (!prompt || !embeds) refuse_usage("the prompt or the place for its embeddings is NULL.");
    check_struct(result, "tmd_result_init");
    Pipeline& pipeline = opened(context);
    need_room("embeddings", count, embeds_count(pipeline.manifest()), "floats");
    Progress progress(nullptr, nullptr, 1);
    std::string warnings;
    std::int32_t dropped = 0;
    pipeline.check_one(kText);
    const std::vector<float> values = pipeline.encode(prompt, progress, 1, warnings, &dropped);
    set_warnings(context, std::move(warnings));
    std::copy(values.begin(), values.end(), embeds);
    if (!result) return;
    tmd_result out = result_of(progress);
    out.dropped_tokens = dropped;
    out.tokens = static_cast<std::int32_t>(static_cast<std::int64_t>(values.size()) / pipeline.manifest().text.dim);
    write_struct(result, out);
  });
}

tmd_status tmd_denoise(tmd_context* context, const float* embeds, const float* negative, int32_t tokens,
                       const tmd_run_options* given, float* latents, size_t count, tmd_result* result) {
  return stoppable(context, [&] {
    check_struct(result, "tmd_result_init");
    Pipeline& pipeline = opened(context);
    const Manifest& manifest = pipeline.manifest();
    const bool classes = manifest.classes() != 0;
    if ((!embeds && !classes) || !latents) refuse_usage("the embeddings or the place for the latents is NULL.");
    if (classes && (embeds || negative || tokens))
      refuse_usage("this model draws numbered classes and takes no embeddings: give NULL, and 0 tokens.");
    const tmd_run_options options = options_of(given);
    const Settings settings = resolve_settings(manifest, options);
    if (!classes && (tokens < 1 || tokens > 65536))
      refuse_usage("embeddings of " + std::to_string(tokens) + " tokens cannot be used: give 1 to 65536.");
    std::vector<float> empty;
    if (!classes && settings.passes() == 2 && !negative && manifest.text.null_embeds)
      negative = (empty = pipeline.null_embeds(tokens)).data();
    if (!classes && (settings.passes() == 2) != (negative != nullptr))
      refuse_usage(negative ? "negative_embeds need guidance, and this run has none: leave them out, or set guidance."
                            : "this run has guidance, which needs negative_embeds: give them, or set guidance to 1.");
    for (const float* each : {embeds, negative})
      if (each && !all_finite(each, static_cast<std::size_t>(tokens) * static_cast<std::size_t>(manifest.text.dim)))
        refuse_usage("the embeddings hold NaN or Inf: encode the prompt again.");
    need_room("latents", count, settings.latents_count(), "floats");
    std::string warnings = settings.warnings;
    pipeline.prepare(latent_size(manifest, settings), kDenoise, warnings);
    Progress progress(options.on_progress, options.user, family_of(manifest).reported_steps(settings));
    Start start = start_of(pipeline, options, settings, progress);
    start.embeds = embeds;
    start.negative = negative;
    Denoised made = pipeline.denoise(start, classes ? 1 : tokens, settings, progress);
    set_warnings(context, std::move(warnings));
    std::copy(made.latents.begin(), made.latents.end(), latents);
    write_result(result, context, settings, progress, 0, std::move(made.times));
  });
}

tmd_status tmd_decode(tmd_context* context, const float* latents, int32_t latent_frames, int32_t latent_height,
                      int32_t latent_width, const tmd_run_options* given, uint8_t* frames, size_t size,
                      tmd_result* result) {
  return stoppable(context, [&] {
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
    pipeline.prepare({latent_frames, latent_height, latent_width}, kDecode, warnings);
    Progress progress(options.on_progress, options.user,
                      pipeline.decode_steps(latent_frames, latent_height, latent_width));
    pipeline.decode(latents, latent_frames, latent_height, latent_width, std::ref(pieces), progress);
    pieces.finish();
    set_warnings(context, std::move(warnings));
    if (result) write_struct(result, result_of(progress));
  });
}

tmd_status tmd_encode_image(tmd_context* context, const uint8_t* rgb, int32_t width, int32_t height, float* latents,
                            size_t count, tmd_result* result) {
  return stoppable(context, [&] {
    if (!rgb || !latents) refuse_usage("the picture or the place for its latents is NULL.");
    check_struct(result, "tmd_result_init");
    Pipeline& pipeline = opened(context);
    const LatentInfo& geometry = pipeline.manifest().latents;
    const std::int64_t stride = geometry.spatial_stride;
    for (const std::int64_t length : {width, height})
      if (length < stride || length % stride || length > 65536)
        refuse_usage("a picture of " + std::to_string(width) + "x" + std::to_string(height) +
                     " cannot be encoded: scale it to multiples of " + std::to_string(stride) + ".");
    need_room("latents", count, static_cast<std::size_t>(geometry.channels * (width / stride) * (height / stride)),
              "floats");
    Progress progress(nullptr, nullptr, 1);
    pipeline.check_one(kPicture);
    const std::vector<float> values = pipeline.encode_image(rgb, width, height, progress);
    set_warnings(context, "");
    std::copy(values.begin(), values.end(), latents);
    if (result) write_struct(result, result_of(progress));
  });
}
