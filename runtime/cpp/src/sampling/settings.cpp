#include "sampling/settings.hpp"

#include <algorithm>
#include <cmath>
#include <random>
#include <sstream>

#include "base/error.hpp"
#include "sampling/schedule.hpp"

namespace tmd::internal {
namespace {

constexpr std::int64_t kMaxSteps = 1000;
constexpr double kMaxDeadline = 86400;  // a day
constexpr double kMaxRho = 10;

// As Python's format "g".
std::string short_number(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

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

void check_steps(std::int64_t steps, const SamplerInfo& sampler) {
  if (steps < 1 || steps > kMaxSteps)
    refuse_usage(std::to_string(steps) + " steps cannot be done: choose 1 to 1000 (default " +
                 std::to_string(sampler.steps) + ").");
}

void resolve_guidance(const SamplerInfo& sampler, const tmd_run_options& options, Settings& settings) {
  if (options.guidance > 1000)
    refuse_usage("this guidance is out of range: choose 0 to 1000, where 1 switches it off.");
  settings.guidance = options.guidance >= 0 ? options.guidance : sampler.guidance;
  if (options.negative_prompt && settings.guidance == 1)
    refuse_usage("a negative prompt needs guidance, and this run has none: choose a guidance other than 1.");
  settings.negative_prompt = options.negative_prompt ? options.negative_prompt : sampler.negative_prompt.value_or("");
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
  check_steps(settings.steps, sampler);
  if (options.shift >= 0 && !sampler.times.empty())
    refuse_usage("this model was distilled for fixed times, which have no shift to choose: leave it out.");
  if (options.shift >= 0 && !(options.shift >= 1 && options.shift <= 1000))
    refuse_usage("this shift is out of range: choose 1 to 1000.");
  resolve_guidance(sampler, options, settings);
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

// What takes a jump from any time to any other, or was made for such a model.
void refuse_jumps(const tmd_run_options& options) {
  const auto refuse = [](bool wanted, const char* what) {
    if (wanted) refuse_usage(std::string(what) + " is for Transition Models, and this is none: leave it out.");
  };
  refuse(options.schedule != nullptr, "a schedule of one's own");
  refuse(options.deadline >= 0, "a deadline");
  refuse(options.strength >= 0 || options.init_latents, "to start from a picture");
  refuse(options.rho >= 0, "rho");
}

void check_label(const ModelInfo& model, std::int32_t label) {
  const std::string range = "0 to " + std::to_string(model.classes - 1) + ".";
  if (!model.classes && label != TMD_DEFAULT)
    refuse_usage("this model takes a prompt and has no numbered classes: leave the label out.");
  if (model.classes && label == TMD_DEFAULT)
    refuse_usage("this model draws numbered classes and takes no prompt: set the label, " + range);
  if (model.classes && (label < 0 || label >= model.classes))
    refuse_usage("there is no class " + std::to_string(label) + ": choose one from " + range);
}

std::vector<double> jump_times(const tmd_run_options& options, std::int64_t count, double start) {
  std::vector<double> times;
  for (std::int64_t k = 0; k <= count; ++k)
    times.push_back(options.schedule ? options.schedule[k]
                                     : start * (1 - static_cast<double>(k) / static_cast<double>(count)));
  bool falls = times.front() == start && times.back() == 0;
  for (std::size_t k = 1; k < times.size(); ++k) falls = falls && times[k] < times[k - 1];
  if (!falls)
    refuse_usage(std::string("the times of a schedule must fall from ") + (start == 1 ? "1 (noise)" : "the strength") +
                 " to 0 (the picture), such as 1, 0.6, 0.2, 0.");
  return times;
}

void resolve_flow_map(const Manifest& manifest, const tmd_run_options& options, Settings& settings) {
  const SamplerInfo& sampler = manifest.sampler;
  if (options.frames != TMD_DEFAULT && options.frames != 1)
    refuse_usage("this model makes stills, so it cannot do " + std::to_string(options.frames) +
                 " frames: leave them out.");
  if (manifest.model.classes && options.negative_prompt)
    refuse_usage("this model draws numbered classes, which have no negative prompt: leave it out.");
  if ((options.inner_steps != TMD_DEFAULT && options.inner_steps != 1) || options.shift >= 0)
    refuse_usage("this model is a Transition Model, which has neither inner steps nor a shift: leave them out.");
  if (options.deadline == 0 || options.deadline > kMaxDeadline)
    refuse_usage("this deadline is out of range: choose above 0, up to 86400 seconds.");
  if (options.deadline > 0) settings.deadline = options.deadline;
  if (settings.deadline && options.on_preview)
    refuse_usage("previews take time that a deadline cannot plan with: leave the preview or the deadline out.");
  if (options.schedule && options.steps != TMD_DEFAULT)
    refuse_usage("a schedule says how many steps there are: leave the steps out.");
  settings.steps = options.schedule                ? std::int64_t{options.schedule_count} - 1
                   : options.steps != TMD_DEFAULT  ? options.steps
                   : settings.deadline.has_value() ? kMaxSteps
                                                   : sampler.steps;
  check_steps(settings.steps, sampler);
  if (options.strength >= 0) settings.strength = options.strength;
  const double start = settings.strength.value_or(1.0);
  if (!(start > 0 && start <= 1))
    refuse_usage("this strength is out of range: choose above 0 (keeps the picture) and up to 1.");
  settings.times = jump_times(options, settings.steps, start);
  settings.scheduled = options.schedule != nullptr;
  if (options.rho > kMaxRho) refuse_usage("this rho is out of range: choose 0 (no fresh noise) to 10.");
  resolve_guidance(sampler, options, settings);
  if (settings.steps >= 3) {
    settings.rho = options.rho >= 0 ? options.rho : sampler.rho;
  } else if (options.rho > 0) {
    settings.warnings += std::to_string(settings.steps) +
                         " steps have none between the first and the last, where rho adds noise: there is none.\n";
  }
  std::copy(std::begin(sampler.guidance_interval), std::end(sampler.guidance_interval), settings.guidance_interval);
  settings.label = options.label;
  const double low = settings.guidance_interval[0], high = settings.guidance_interval[1];
  if (std::any_of(settings.times.begin(), settings.times.end() - 1, [&](double t) { return low < t && t < high; }))
    return;
  const bool asked = (options.guidance >= 0 && options.guidance != 1) || options.negative_prompt;
  if (asked)
    settings.warnings += "no step begins at a time between " + short_number(low) + " and " + short_number(high) +
                         ", where guidance takes part: there is none.\n";
  settings.guidance = 1;
  settings.negative_prompt.clear();
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
  for (const double value : {options.guidance, options.shift, options.rho, options.deadline, options.strength})
    if (std::isnan(value))
      refuse_usage("one of the options is not a number: use tmd_run_options_init, then set what shall differ.");
  if (options.seed < TMD_RANDOM_SEED)
    refuse_usage("the seed " + std::to_string(options.seed) + " is out of range: choose a whole number from 0 up.");
  // 32 bits: torch's CPU generator, whose stream we follow, uses no more of a seed.
  settings.seed = options.seed == TMD_RANDOM_SEED ? static_cast<std::int64_t>(std::random_device()()) : options.seed;
  const bool is_tim = manifest.model.kind == "tim";
  if (!is_tim) refuse_jumps(options);
  check_label(manifest.model, options.label);
  if (is_tim) {
    resolve_flow_map(manifest, options, settings);
  } else if (manifest.sampler.rule == "transition") {
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
    settings.warnings += "the model was made for " + (is_tim ? "stills" : std::to_string(video.frames) + " frames") +
                         " of " + pixels(video) + "; " + (is_tim ? "" : std::to_string(settings.frames) + " of ") +
                         pixels(settings) + " may look worse.\n";
  const double inner = static_cast<double>(settings.inner_steps - 1) * static_cast<double>(manifest.model.head_blocks);
  settings.nfe = static_cast<double>(settings.steps) * (1.0 + inner / static_cast<double>(manifest.model.num_layers));
  settings.nfe *= settings.passes();
  if (is_tim) settings.nfe = settings.nfe_through(settings.times);
  return settings;
}

double Settings::nfe_through(const std::vector<double>& way) const {
  double evaluations = 0;
  for (std::size_t k = 0; k + 1 < way.size(); ++k) evaluations += guided(way[k]) ? 2 : 1;
  return evaluations;
}

}  // namespace tmd::internal
