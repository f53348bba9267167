#include "settings.hpp"

#include <algorithm>
#include <random>

#include "error.hpp"
#include "schedule.hpp"

namespace tmd::internal {
namespace {

constexpr std::int64_t kMaxSteps = 1000;

std::int64_t choose(const char* what, std::int32_t value, std::int64_t standard,
                    const std::vector<std::int64_t>& allowed) {
  if (value == TMD_DEFAULT) return standard;
  if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return value;
  std::string list;
  for (std::size_t i = 0; i < allowed.size(); ++i)
    list += (i == 0 ? "" : i + 1 == allowed.size() ? " or " : ", ") + std::to_string(allowed[i]);
  refuse_usage("this model does not do " + std::to_string(value) + " " + what + ": choose " + list + " (default " +
               std::to_string(standard) + ").");
}

void resolve_student(const SamplerInfo& sampler, const tmd_run_options& options, Settings& settings) {
  const auto refuse = [](const char* what) {
    refuse_usage(std::string("this model is a TMD student, which takes no ") + what +
                 ": it was trained without. Leave it out.");
  };
  if (options.guidance >= 0 && options.guidance != 1) refuse("guidance");
  if (options.negative_prompt) refuse("negative prompt");
  if (options.shift >= 0) refuse("shift");
  settings.steps = choose("steps", options.steps, sampler.steps, sampler.allowed_steps);
  settings.inner_steps = choose("inner steps", options.inner_steps, sampler.inner_steps, sampler.allowed_inner_steps);
  shift_grid(settings.steps, sampler.shift, sampler.t_max);
  shift_grid(settings.inner_steps, sampler.inner_shift, sampler.t_max);
}

void resolve_velocity(const SamplerInfo& sampler, const tmd_run_options& options, Settings& settings) {
  if (options.inner_steps != TMD_DEFAULT && options.inner_steps != 1)
    refuse_usage("this model has no inner steps, so it cannot do " + std::to_string(options.inner_steps) +
                 ": leave them out.");
  if (!sampler.any_steps) {
    settings.steps = choose("steps", options.steps, sampler.steps, sampler.allowed_steps);
  } else {
    settings.steps = options.steps == TMD_DEFAULT ? sampler.steps : options.steps;
  }
  if (settings.steps < 1 || settings.steps > kMaxSteps)
    refuse_usage(std::to_string(settings.steps) + " steps cannot be done: choose 1 to 1000 (default " +
                 std::to_string(sampler.steps) + ").");
  if (options.shift >= 0 && !sampler.times.empty())
    refuse_usage("this model was distilled for fixed times, which have no shift to choose: leave it out.");
  if (options.shift >= 0 && !(options.shift >= 1 && options.shift <= 1000))
    refuse_usage("this shift is out of range: choose 1 to 1000.");
  if (options.guidance > 1000)
    refuse_usage("this guidance is out of range: choose 0 to 1000, where 1 switches it off.");
  settings.guidance = options.guidance >= 0 ? options.guidance : sampler.guidance;
  if (options.negative_prompt && settings.guidance == 1)
    refuse_usage("a negative prompt needs guidance, and this run has none: choose a guidance other than 1.");
  settings.negative_prompt = options.negative_prompt ? options.negative_prompt : sampler.negative_prompt.value_or("");
  if (sampler.times.empty()) {
    settings.times = wan_grid(settings.steps, options.shift >= 0 ? options.shift : sampler.shift);
  } else {
    settings.times.assign(sampler.times.begin(), sampler.times.begin() + settings.steps);
    settings.times.push_back(0.0);
  }
  if (sampler.guidance == 1 && settings.guidance != 1)
    settings.warnings +=
        "the model was distilled to do without guidance; it takes twice the time and may look worse.\n";
}

void check_positions(const char* what, std::int64_t value, std::int64_t limit) {
  if (value > limit)
    refuse_usage(std::to_string(value) + " " + what + " are more than the model has positions for: choose at most " +
                 std::to_string(limit) + ".");
}

void resolve_size(const Manifest& manifest, Settings& settings) {
  const std::int64_t stride = manifest.latents.temporal_stride;
  if (settings.frames < 1 || (settings.frames - 1) % stride) {
    const std::int64_t below = std::max<std::int64_t>(settings.frames - 1, 0) / stride * stride + 1;
    refuse_usage(std::to_string(settings.frames) + " frames cannot be made: choose 1 plus a multiple of " +
                 std::to_string(stride) + ", such as " + std::to_string(below) + " or " +
                 std::to_string(below + stride) + ".");
  }
  check_positions("frames", settings.frames, (kRopePositions - 1) * stride + 1);
  for (const bool wide : {true, false}) {
    const std::int64_t pixels = wide ? settings.width : settings.height;
    const std::int64_t unit = manifest.latents.spatial_stride * manifest.model.patch_size[wide ? 2 : 1];
    if (pixels < unit || pixels % unit) {
      const std::int64_t below = std::max<std::int64_t>(pixels / unit, 1) * unit;
      refuse_usage(std::string("a ") + (wide ? "width" : "height") + " of " + std::to_string(pixels) +
                   " pixels cannot be made: choose a multiple of " + std::to_string(unit) + ", such as " +
                   std::to_string(below) + " or " + std::to_string(below + unit) + ".");
    }
    check_positions(wide ? "pixels of width" : "pixels of height", pixels, kRopePositions * unit);
  }
  settings.channels = manifest.latents.channels;
  settings.latent_frames = (settings.frames - 1) / stride + 1;
  settings.latent_height = settings.height / manifest.latents.spatial_stride;
  settings.latent_width = settings.width / manifest.latents.spatial_stride;
}

template <typename Sized>
std::string pixels(const Sized& sized) {
  return std::to_string(sized.width) + "x" + std::to_string(sized.height);
}

}  // namespace

Settings resolve_settings(const Manifest& manifest, const tmd_run_options& options) {
  Settings settings;
  const VideoInfo& video = manifest.video;
  if (options.guidance != options.guidance || options.shift != options.shift)
    refuse_usage("guidance or shift is not a number: use tmd_run_options_init, then set what shall differ.");
  if (options.seed < TMD_RANDOM_SEED)
    refuse_usage("the seed " + std::to_string(options.seed) + " is out of range: choose a whole number from 0 up.");
  // 32 bits: torch's CPU generator, whose stream we follow, uses no more of a seed.
  settings.seed = options.seed == TMD_RANDOM_SEED ? static_cast<std::int64_t>(std::random_device()()) : options.seed;
  if (manifest.sampler.rule == "transition") {
    resolve_student(manifest.sampler, options, settings);
  } else {
    resolve_velocity(manifest.sampler, options, settings);
  }
  settings.frames = options.frames == TMD_DEFAULT ? video.frames : options.frames;
  if ((options.width == TMD_DEFAULT) != (options.height == TMD_DEFAULT))
    refuse_usage("only one of width and height is given: give both, or neither.");
  settings.width = options.width == TMD_DEFAULT ? video.width : options.width;
  settings.height = options.height == TMD_DEFAULT ? video.height : options.height;
  settings.fps = video.fps;
  resolve_size(manifest, settings);
  if (settings.frames != video.frames || settings.width != video.width || settings.height != video.height)
    settings.warnings += "the model was made for " + std::to_string(video.frames) + " frames of " + pixels(video) +
                         "; " + std::to_string(settings.frames) + " of " + pixels(settings) + " may look worse.\n";
  const double inner = static_cast<double>(settings.inner_steps - 1) * static_cast<double>(manifest.model.head_blocks);
  settings.nfe = static_cast<double>(settings.steps) * (1.0 + inner / static_cast<double>(manifest.model.num_layers));
  settings.nfe *= settings.passes();
  return settings;
}

}  // namespace tmd::internal
