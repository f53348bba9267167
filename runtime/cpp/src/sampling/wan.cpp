// Wan transformers without inner flow: one velocity per step, or two with guidance, and a rule that makes the step. The
// twin of tmd_runtime/sampling/wan.py.
#include "sampling/wan.hpp"

#include "base/error.hpp"
#include "base/quote.hpp"
#include "sampling/family.hpp"
#include "sampling/schedule.hpp"

namespace tmd::internal {

void refuse_inner_steps(const tmd_run_options& options) {
  if (options.inner_steps != TMD_DEFAULT && options.inner_steps != 1)
    refuse_usage("this model has no inner steps, so it cannot do " + std::to_string(options.inner_steps) +
                 ": leave them out.");
}

double choose_shift(const WanSampler& sampler, const tmd_run_options& options) {
  if (options.shift >= 0 && !(options.shift >= 1 && options.shift <= 1000))
    refuse_usage("this shift is out of range: choose 1 to 1000.");
  return options.shift >= 0 ? options.shift : sampler.shift;
}

void resolve_model_guidance(const WanSampler& sampler, const tmd_run_options& options, Settings& settings) {
  resolve_guidance(options, sampler.guidance, sampler.negative_prompt, settings);
  if (sampler.guidance == 1 && settings.guidance != 1)
    settings.warnings +=
        "the model was distilled to do without guidance; it takes twice the time and may look worse.\n";
}

namespace {

class Wan : public RuntimeFamily {
 public:
  const char* name() const override { return "wan"; }

  std::shared_ptr<ModelInfo> read_model(Object& object) const override {
    const auto model = std::make_shared<WanModel>();
    if (const Field first = object.maybe("first_frame"); first.present()) model->first_frame = first.boolean();
    return model;
  }
  bool holds_first_frame(const ModelInfo& model) const override {
    return static_cast<const WanModel&>(model).first_frame;
  }

  std::shared_ptr<const SamplerInfo> read_sampler(Object& object) const override {
    const auto sampler = std::make_shared<WanSampler>();
    const Field rule = object.need("rule"), steps = object.need("steps"), allowed = object.maybe("allowed_steps"),
                times = object.maybe("times");
    sampler->rule = rule.string();
    if (!find_rule(sampler->rule)) rule.refuse("must be one of " + rule_names());
    sampler->steps = read_steps(steps);
    if (!allowed.is_null()) sampler->allowed_steps = read_allowed_steps(allowed, 1000, steps, sampler->steps);
    sampler->shift = object.need("shift").number(1, 1000);
    if (const Field grid = object.maybe("grid"); grid.present())
      sampler->grid = grid.one_of({"wan", "diffusers-unipc", "diffusers-euler"});
    sampler->time_rounding = object.need("time_rounding").one_of({"none", "integer", "nearest", "bfloat16"});
    if (const Field scale = object.maybe("init_scale"); scale.present())
      sampler->init_scale = scale.number(0, 1000, false);
    sampler->guidance = object.need("guidance").number(0, 1000);
    if (const Field prompt = object.maybe("negative_prompt"); !prompt.is_null())
      sampler->negative_prompt = prompt.text();
    const Field boundary = object.maybe("boundary"), guidance_2 = object.maybe("guidance_2");
    if (!boundary.is_null()) sampler->boundary = boundary.number(0, 1, false);
    if (!guidance_2.is_null()) {
      sampler->guidance_2 = guidance_2.number(0, 1000);
      if (!sampler->boundary) guidance_2.refuse("is for a model with a boundary");
      if ((sampler->guidance == 1) != (*sampler->guidance_2 == 1))
        guidance_2.refuse("and guidance must both be 1, or neither");
    }
    if (times.is_null()) return sampler;
    for (const Field& item : times.list(1, 1000)) sampler->times.push_back(item.number(0, 1, false));
    for (std::size_t i = 1; i < sampler->times.size(); ++i)
      if (sampler->times[i] >= sampler->times[i - 1]) times.refuse("must be descending without repeats");
    if (allowed.is_null() || sampler->allowed_steps.back() > static_cast<std::int64_t>(sampler->times.size()))
      times.refuse("needs allowed_steps, none above " + std::to_string(sampler->times.size()) +
                   ": there are as many times");
    return sampler;
  }

  std::string problem(const Manifest& manifest) const override {
    if (static_cast<const WanSampler&>(*manifest.sampler).boundary) return "";
    for (const char* name : {"backbone_2", "flow_head_2"})
      if (manifest.graphs.count(name))
        return "graph " + quote(name) + " needs a sampler.boundary, which says when it takes over";
    return "";
  }

  // A model has its own list of times, or a grid for any number of steps.
  void resolve(const Manifest& manifest, const tmd_run_options& options, Settings& settings) const override {
    refuse_jumps(options, manifest.holds_first_frame());
    const auto& sampler = static_cast<const WanSampler&>(*manifest.sampler);
    refuse_inner_steps(options);
    settings.steps = choose_steps(sampler, options.steps);
    if (options.shift >= 0 && !sampler.times.empty())
      refuse_usage("this model was distilled for fixed times, which have no shift to choose: leave it out.");
    const double shift = choose_shift(sampler, options);
    resolve_model_guidance(sampler, options, settings);
    // A wish is for both transformers.
    settings.guidance_2 = options.guidance >= 0 ? settings.guidance : sampler.guidance_2.value_or(settings.guidance);
    if (sampler.times.empty()) {
      settings.times = make_grid(sampler.grid, settings.steps, shift);
    } else {
      settings.times.assign(sampler.times.begin(), sampler.times.begin() + settings.steps);
      settings.times.push_back(0.0);
    }
  }

  std::unique_ptr<Loop> make_loop(const Manifest& manifest, Graphs graphs, const Settings& settings,
                                  std::int64_t tokens) const override {
    return std::make_unique<WanLoop>(manifest, std::move(graphs), settings, tokens);
  }
};

}  // namespace

const RuntimeFamily& wan_family() {
  static const Wan family;
  return family;
}

}  // namespace tmd::internal
