#include "sampling/settings.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <random>

#include "base/error.hpp"
#include "sampling/family.hpp"
#include "sampling/schedule.hpp"

namespace tmd::internal {
namespace {

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

void check_label(std::int64_t classes, std::int32_t label) {
  const std::string range = "0 to " + std::to_string(classes - 1) + ".";
  if (!classes && label != TMD_DEFAULT)
    refuse_usage("this model takes a prompt and has no numbered classes: leave the label out.");
  if (classes && label == TMD_DEFAULT)
    refuse_usage("this model draws numbered classes and takes no prompt: set the label, " + range);
  if (classes && (label < 0 || label >= classes))
    refuse_usage("there is no class " + std::to_string(label) + ": choose one from " + range);
}

void check_positions(const char* what, std::int64_t value, std::int64_t limit) {
  if (value > limit)
    refuse_usage(std::to_string(value) + " " + what + " are more than the model has positions for: choose at most " +
                 std::to_string(limit) + ".");
}

template <typename Sized>
std::string pixels(const Sized& sized) {
  return std::to_string(sized.width) + "x" + std::to_string(sized.height);
}

bool fits_memory(std::initializer_list<std::int64_t> lengths) {
  std::ptrdiff_t bytes = 1;
  for (const std::int64_t length : lengths)
    if (__builtin_mul_overflow(bytes, length, &bytes)) return false;
  return true;
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
    const std::int64_t unit = manifest.latents.spatial_stride * manifest.model->patch_size[wide ? 2 : 1];
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
  if (!fits_memory({settings.frames, settings.height, settings.width, 3}) ||
      !fits_memory({settings.channels, settings.latent_frames, settings.latent_height, settings.latent_width, 4}))
    refuse_usage(std::to_string(settings.frames) + " frames of " + pixels(settings) +
                 " are more than any memory holds: choose fewer or smaller ones.");
}

}  // namespace

std::int64_t choose_steps(const SamplerInfo& sampler, std::int32_t wish) {
  if (!sampler.allowed_steps.empty()) return choose("steps", wish, sampler.steps, sampler.allowed_steps);
  const std::int64_t steps = wish == TMD_DEFAULT ? sampler.steps : wish;
  check_steps(steps, sampler);
  return steps;
}

std::int64_t choose_inner_steps(const SamplerInfo& sampler, std::int32_t wish) {
  return choose("inner steps", wish, sampler.inner_steps, sampler.allowed_inner_steps);
}

void check_steps(std::int64_t steps, const SamplerInfo& sampler) {
  if (steps < 1 || steps > kMaxSteps)
    refuse_usage(std::to_string(steps) + " steps cannot be done: choose 1 to 1000 (default " +
                 std::to_string(sampler.steps) + ").");
}

void resolve_guidance(const tmd_run_options& options, double guidance,
                      const std::optional<std::string>& negative_prompt, Settings& settings) {
  if (options.guidance > 1000)
    refuse_usage("this guidance is out of range: choose 0 to 1000, where 1 switches it off.");
  settings.guidance = options.guidance >= 0 ? options.guidance : guidance;
  if (options.negative_prompt && settings.guidance == 1)
    refuse_usage("a negative prompt needs guidance, and this run has none: choose a guidance other than 1.");
  settings.negative_prompt = options.negative_prompt ? options.negative_prompt : negative_prompt.value_or("");
}

void refuse_jumps(const tmd_run_options& options, bool holds_first_frame) {
  for (const auto& [wanted, what] : {std::pair(options.schedule != nullptr, "a schedule of one's own"),
                                     std::pair(options.deadline >= 0, "a deadline")})
    if (wanted)
      refuse_usage(std::string(what) + " is for Transition Models and flow maps, and this is none: leave it out.");
  refuse_pictures(options, holds_first_frame);
}

void refuse_pictures(const tmd_run_options& options, bool holds_first_frame) {
  if (holds_first_frame && options.strength >= 0)
    refuse_usage("this model holds a picture as the first frame, unchanged: leave the strength out.");
  if (!holds_first_frame && (options.strength >= 0 || options.init_latents))
    refuse_usage("to start from a picture is for Transition Models, and to hold one as the first frame of a video for "
                 "Wan2.2-TI2V-5B. This model does neither: leave it out. (A Wan2.2-TI2V-5B that tmd exported before it "
                 "could do so is to be exported again.)");
  if (options.rho >= 0) refuse_usage("rho is for Transition Models, and this is none: leave it out.");
}

Settings resolve_settings(const Manifest& manifest, const tmd_run_options& options) {
  Settings settings;
  const VideoInfo& video = manifest.video;
  for (const double value : {options.guidance, options.shift, options.rho, options.deadline, options.strength})
    if (std::isnan(value))
      refuse_usage("one of the options is not a number: use tmd_run_options_init, then set what shall differ.");
  if (options.seed < TMD_RANDOM_SEED)
    refuse_usage("the seed " + std::to_string(options.seed) + " is out of range: choose a whole number from 0 up.");
  if (options.seed > std::int64_t{0xFFFFFFFF})
    refuse_usage("the seed " + std::to_string(options.seed) + " is out of range: torch's generator, whose noise this is, "
                 "reads 32 bits. Choose a whole number from 0 to 4294967295 (2^32-1).");
  settings.seed = options.seed == TMD_RANDOM_SEED ? static_cast<std::int64_t>(std::random_device()()) : options.seed;
  check_label(manifest.classes(), options.label);
  settings.label = options.label;
  family_of(manifest).resolve(manifest, options, settings);
  settings.frames = options.frames == TMD_DEFAULT ? video.frames : options.frames;
  if ((options.width == TMD_DEFAULT) != (options.height == TMD_DEFAULT))
    refuse_usage("only one of width and height is given: give both, or neither.");
  settings.width = options.width == TMD_DEFAULT ? video.width : options.width;
  settings.height = options.height == TMD_DEFAULT ? video.height : options.height;
  settings.fps = video.fps;
  resolve_size(manifest, settings);
  const bool stills = manifest.family->makes_stills();
  if (settings.frames != video.frames || settings.width != video.width || settings.height != video.height)
    settings.warnings += "the model was made for " + (stills ? "stills" : std::to_string(video.frames) + " frames") +
                         " of " + pixels(video) + "; " + (stills ? "" : std::to_string(settings.frames) + " of ") +
                         pixels(settings) + " may look worse.\n";
  settings.nfe = family_of(manifest).nfe(*manifest.model, settings);
  return settings;
}

}  // namespace tmd::internal
