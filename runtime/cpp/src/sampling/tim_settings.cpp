#include "sampling/tim_settings.hpp"

#include <algorithm>
#include <locale>
#include <sstream>

#include "base/error.hpp"
#include "sampling/jumps.hpp"

namespace tmd::internal {
namespace {

constexpr double kMaxRho = 10;

// As Python's format "g".
std::string short_number(double value) {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text << value;
  return text.str();
}

// Wishes that no Transition Model grants.
void refuse(const Manifest& manifest, const tmd_run_options& options) {
  if (options.frames != TMD_DEFAULT && options.frames != 1)
    refuse_usage("this model makes stills, so it cannot do " + std::to_string(options.frames) +
                 " frames: leave them out.");
  if (manifest.classes() && options.negative_prompt)
    refuse_usage("this model draws numbered classes, which have no negative prompt: leave it out.");
  if ((options.inner_steps != TMD_DEFAULT && options.inner_steps != 1) || options.shift >= 0)
    refuse_usage("this model is a Transition Model, which has neither inner steps nor a shift: leave them out.");
  if (options.strength >= 0 && !(options.strength > 0 && options.strength <= 1))
    refuse_usage("this strength is out of range: choose above 0 (keeps the picture) and up to 1.");
  if (options.rho > kMaxRho) refuse_usage("this rho is out of range: choose 0 (no fresh noise) to 10.");
}

// Without guidance if no step takes it.
void resolve_interval(const TimSampler& sampler, const tmd_run_options& options, Settings& settings) {
  resolve_guidance(options, sampler.guidance, sampler.negative_prompt, settings);
  std::copy(std::begin(sampler.guidance_interval), std::end(sampler.guidance_interval), settings.guidance_interval);
  const double low = sampler.guidance_interval[0], high = sampler.guidance_interval[1];
  const auto inside = [&](double t) { return low < t && t < high; };
  if (std::any_of(settings.times.begin(), settings.times.end() - 1, inside)) return;
  if ((options.guidance >= 0 && options.guidance != 1) || options.negative_prompt)
    settings.warnings += "no step begins at a time between " + short_number(low) + " and " + short_number(high) +
                         ", where guidance takes part: there is none.\n";
  settings.guidance = 1;
  settings.negative_prompt.clear();
}

}  // namespace

std::shared_ptr<ModelInfo> read_tim_model(Object& object) {
  const auto model = std::make_shared<TimModel>();
  model->rope = object.need("rope").one_of({"index", "grid"});
  if (const Field classes = object.maybe("classes"); !classes.is_null()) model->classes = read_count(classes);
  return model;
}

std::shared_ptr<const SamplerInfo> read_tim_sampler(Object& object) {
  const auto sampler = std::make_shared<TimSampler>();
  sampler->rule = object.need("rule").one_of({"flow_map"});
  sampler->steps = read_steps(object.need("steps"));
  sampler->guidance = object.need("guidance").number(0, 1000);
  if (const Field interval = object.maybe("guidance_interval"); interval.present()) {
    const std::vector<Field> ends = interval.list(2, 2);
    const double low = ends[0].number(0, 1), high = ends[1].number(0, 2, false);
    if (low >= high) interval.refuse("is empty");
    sampler->guidance_interval[0] = low, sampler->guidance_interval[1] = high;
  }
  if (const Field prompt = object.maybe("negative_prompt"); !prompt.is_null()) sampler->negative_prompt = prompt.text();
  if (const Field rho = object.maybe("rho"); rho.present()) sampler->rho = rho.number(0, kMaxRho);
  return sampler;
}

void resolve_tim(const Manifest& manifest, const tmd_run_options& options, Settings& settings) {
  const auto& sampler = static_cast<const TimSampler&>(*manifest.sampler);
  refuse(manifest, options);
  if (options.strength >= 0) settings.strength = options.strength;
  const double start = settings.strength.value_or(1.0);
  const auto grid = [start](std::int64_t steps) {
    std::vector<double> times;
    for (std::int64_t k = 0; k <= steps; ++k)
      times.push_back(start * (1 - static_cast<double>(k) / static_cast<double>(steps)));
    return times;
  };
  resolve_jumps(sampler, options, grid, start, "the picture", settings);
  if (settings.steps >= 3) {
    settings.rho = options.rho >= 0 ? options.rho : sampler.rho;
  } else if (options.rho > 0) {
    settings.warnings += std::to_string(settings.steps) +
                         " steps have none between the first and the last, where rho adds noise: there is none.\n";
  }
  resolve_interval(sampler, options, settings);
}

}  // namespace tmd::internal
