// Wan transformers without inner flow: one velocity per step, or two with guidance, and a rule that makes the step. The
// twin of tmd_runtime/sampling/wan.py.
//
// Both graphs are the transformer, cut in two: the features of the backbone go straight into the rest of it. Of a model
// with two transformers (Wan2.2-A14B) the first one makes the steps of high noise and the second one all others, on the
// same buffers.
#include <set>

#include "base/quote.hpp"
#include "sampling/backbone.hpp"
#include "sampling/calls.hpp"
#include "sampling/family.hpp"
#include "sampling/schedule.hpp"
#include "sampling/update.hpp"

namespace tmd::internal {
namespace {

// How to sample a model whose output is the velocity at the time it was asked for.
struct WanSampler : SamplerInfo {
  double shift = 1.0;
  std::vector<double> times;  // noise to data, 0 left out; empty: those of `grid`
  std::string grid = "wan";
  std::string time_rounding = "none";
  double init_scale = 1.0, guidance = 1.0;
  std::optional<std::string> negative_prompt;
  // Steps from below the boundary, by what the network is told, are those of the second transformer.
  std::optional<double> boundary, guidance_2;
};

// The sampler of a velocity model, with classifier-free guidance.
class WanLoop : public Loop {
 public:
  WanLoop(const Manifest& manifest, Graphs graphs, const Settings& settings, std::int64_t tokens)
      : sampler_(static_cast<const WanSampler&>(*manifest.sampler)),
        rule_(find_rule(sampler_.rule)),
        embeds_count_(static_cast<std::size_t>(tokens * manifest.text.dim)),
        update_(graphs.update),
        transformer_(graphs.transformer),
        bound_(*graphs.backbone, manifest, settings, tokens),
        velocity_(graphs.flow_head->empty("velocity", bound_.dims)),
        updater_(update_, bound_.x, bound_.dims) {
    transformers_[0] = tied(std::move(bound_.step), {graphs.backbone, graphs.flow_head});
  }

  Denoised run(const Start& start, const Settings& settings, Progress& progress) override {
    const std::vector<double>& times = settings.times;
    const bool guided = start.negative != nullptr;
    std::vector<Coefficients> factors;
    for (std::size_t i = 0; i + 1 < times.size(); ++i) factors.push_back(rule_(times, i));
    const std::set<std::string> slots = slots_of(factors, guided);
    const bool remembers = slots.count("before_1");
    Step* bound_update = nullptr;
    progress.timed(TMD_STAGE_LOAD, [&] { bound_update = &update_with(slots); });  // an engine may compile here
    Step& update = *bound_update;
    const std::int64_t passes = settings.steps * (guided ? 2 : 1);
    Calls backbone(progress, TMD_STAGE_BACKBONE, passes), flow_head(progress, TMD_STAGE_FLOW_HEAD, passes);
    Draws draws(settings.seed, settings.latents_count(), progress);

    const auto velocity = [&](const Call& call) {
      call(backbone, *active().backbone, true);
      call(flow_head, *active().flow_head, true);
    };
    const Piece step = [&](const Call& call) {
      if (guided) {
        bound_.prompt_embeds.copy(negative_prompt_);
        velocity(call);
        latents_["negative"].copy(velocity_);
        bound_.prompt_embeds.copy(prompt_);
      }
      velocity(call);
      call(flow_head, update, false);
      if (remembers) {
        latents_["before_2"].copy(latents_["before_1"]);
        latents_["before_1"].copy(updater_.data());
      }
    };

    turn_to(is_second(times[0]), progress);
    if (guided)
      put_prompts(start);
    else
      bound_.prompt_embeds.write(start.embeds, embeds_count_);
    draws.into(bound_.x, sampler_.init_scale);
    for (const char* name : {"before_1", "before_2"})
      if (slots.count(name)) latents_[name].copy(bound_.x);  // finite, whatever an earlier run left there
    for (std::size_t i = 0; i < factors.size(); ++i) {
      if (factors[i].noise != 0) draws.into(latents_["noise"]);
      const bool second = is_second(times[i]);
      turn_to(second, progress);
      bound_.t.fill(static_cast<float>(told_time(times[i], sampler_.time_rounding)));
      updater_.set(factors[i], times[i], !guided ? 1.0 : second ? settings.guidance_2 : settings.guidance);
      if (guided) before_step_.copy(bound_.x);
      active().launches.run({&backbone, &flow_head}, step, key_of(slots));
      const auto negative_pass = [&] {  // again, for who asks where NaN came from
        bound_.x.copy(before_step_);
        bound_.prompt_embeds.copy(negative_prompt_);
        active().backbone->run();
      };
      updater_.check(bound_.passed, guided ? std::function<void()>(negative_pass) : nullptr);
      if (start.on_preview && times[i + 1] > 0) start.on_preview(updater_.preview().data());
    }
    return {bound_.x.read<float>(settings.latents_count()), {}};
  }

 private:
  // The graphs of one transformer on the buffers of this loop.
  struct Bound {
    Transformer graphs;
    std::unique_ptr<Step> backbone, flow_head;
    Launches launches;
  };

  // `step` is that of the backbone.
  std::unique_ptr<Bound> tied(std::unique_ptr<Step> step, Transformer graphs) const {
    // Both passes of guidance go through one binding: a second one would cost an engine's working memory again.
    Buffers inputs = {{"x", bound_.x}, {"t", bound_.t}};
    inputs.insert(bound_.rope.begin(), bound_.rope.end());
    inputs.insert(bound_.passed.begin(), bound_.passed.end());
    std::unique_ptr<Step> flow_head = graphs.flow_head->bind(inputs, {{"velocity", velocity_}});
    Launches launches(graphs.backbone);
    return std::make_unique<Bound>(
        Bound{std::move(graphs), std::move(step), std::move(flow_head), std::move(launches)});
  }

  Bound& active() const { return *transformers_[second_ ? 1 : 0]; }
  bool is_second(double t) const {
    return sampler_.boundary && told_time(t, sampler_.time_rounding) < *sampler_.boundary;
  }

  // Makes one of the two transformers the active one; loads it where that is not done.
  void turn_to(bool second, Progress& progress) {
    if (!transformers_[second ? 1 : 0]) {
      const auto let_go = [this] {
        for (std::unique_ptr<Bound>& each : transformers_) each.reset();
      };
      const Transformer graphs = transformer_(second, let_go, progress);
      progress.timed(TMD_STAGE_LOAD, [&] {  // an engine may compile here
        transformers_[second ? 1 : 0] = tied(bound_.bind(*graphs.backbone), graphs);
      });
    }
    second_ = second;
  }

  // The optional inputs of the graph `update` that a run with these factors reads.
  static std::set<std::string> slots_of(const std::vector<Coefficients>& factors, bool guided) {
    std::set<std::string> slots;
    if (guided) slots.insert("negative");
    for (const Coefficients& each : factors) {
      if (each.noise != 0) slots.insert("noise");
      if (each.before_1 != 0 || each.before_2 != 0) slots.insert({"before_1", "before_2"});
    }
    return slots;
  }

  static std::int64_t key_of(const std::set<std::string>& slots) {
    std::int64_t key = 0;
    for (const char* name : {"negative", "noise", "before_1"})
      key = key * 2 + static_cast<std::int64_t>(slots.count(name));
    return key;
  }

  // The update with these slots in use; their buffers are made at their first use, of finite values.
  Step& update_with(const std::set<std::string>& slots) {
    std::unique_ptr<Step>& update = updates_[key_of(slots)];
    if (!update) {
      Buffers used;
      for (const std::string& name : slots) {
        if (!latents_.count(name)) {
          latents_[name] = update_->empty("x_next", bound_.dims);
          latents_[name].fill(0);
        }
        used[name] = latents_[name];
      }
      update = updater_.bind(velocity_, used);
    }
    return *update;
  }

  void put_prompts(const Start& start) {
    const std::pair<Buffer*, const float*> prompts[] = {{&prompt_, start.embeds}, {&negative_prompt_, start.negative}};
    if (!before_step_.bytes()) before_step_ = update_->empty("x_next", bound_.dims);
    for (const auto& [buffer, embeds] : prompts) {
      if (!buffer->bytes()) *buffer = active().graphs.backbone->empty("prompt_embeds", bound_.dims);
      buffer->write(embeds, embeds_count_);
    }
  }

  WanSampler sampler_;
  Rule rule_;
  std::size_t embeds_count_;
  std::shared_ptr<LoadedGraph> update_;
  decltype(Graphs::transformer) transformer_;
  BoundBackbone bound_;
  Buffer velocity_, prompt_, negative_prompt_, before_step_;
  std::unique_ptr<Bound> transformers_[2];
  bool second_ = false;  // whose turn it is
  Updater updater_;
  Buffers latents_;  // slot of the update -> buffer
  std::map<std::int64_t, std::unique_ptr<Step>> updates_;
};

class Wan : public RuntimeFamily {
 public:
  const char* name() const override { return "wan"; }

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
    refuse_jumps(options);
    const auto& sampler = static_cast<const WanSampler&>(*manifest.sampler);
    if (options.inner_steps != TMD_DEFAULT && options.inner_steps != 1)
      refuse_usage("this model has no inner steps, so it cannot do " + std::to_string(options.inner_steps) +
                   ": leave them out.");
    settings.steps = choose_steps(sampler, options.steps);
    if (options.shift >= 0 && !sampler.times.empty())
      refuse_usage("this model was distilled for fixed times, which have no shift to choose: leave it out.");
    if (options.shift >= 0 && !(options.shift >= 1 && options.shift <= 1000))
      refuse_usage("this shift is out of range: choose 1 to 1000.");
    resolve_guidance(options, sampler.guidance, sampler.negative_prompt, settings);
    // A wish is for both transformers.
    settings.guidance_2 = options.guidance >= 0 ? settings.guidance : sampler.guidance_2.value_or(settings.guidance);
    if (sampler.times.empty()) {
      settings.times = make_grid(sampler.grid, settings.steps, options.shift >= 0 ? options.shift : sampler.shift);
    } else {
      settings.times.assign(sampler.times.begin(), sampler.times.begin() + settings.steps);
      settings.times.push_back(0.0);
    }
    if (sampler.guidance == 1 && settings.guidance != 1)
      settings.warnings +=
          "the model was distilled to do without guidance; it takes twice the time and may look worse.\n";
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
