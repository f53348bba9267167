// TMD students: an outer step is one pass of the backbone and an inner flow of the flow head on its features. The twin
// of tmd_runtime/sampling/tmd.py.
#include "sampling/backbone.hpp"
#include "sampling/calls.hpp"
#include "sampling/family.hpp"
#include "sampling/schedule.hpp"
#include "sampling/update.hpp"

namespace tmd::internal {
namespace {

// Defaults, and the step counts that the student was trained for.
struct TmdSampler : SamplerInfo {
  double shift = 1.0, inner_shift = 1.0, t_max = 1.0;
};

// The flow head, bound for the steps of a rollout that starts from `noise` and ends in `velocity`.
class InnerFlow {
 public:
  InnerFlow(std::shared_ptr<LoadedGraph> flow_head, const BoundBackbone& bound)
      : graph_(std::move(flow_head)), dims_(bound.dims), noise_(graph_->empty("noise", dims_)) {
    for (Buffer& y : y_) y = graph_->empty("y_next", dims_);
    s_ = graph_->empty("s", dims_);
    r_ = graph_->empty("r", dims_);
    inputs_ = {{"noise", noise_}, {"s", s_}, {"r", r_}};
    inputs_.insert(bound.passed.begin(), bound.passed.end());
    inputs_.insert(bound.rope.begin(), bound.rope.end());
  }

  const Buffer& noise() const { return noise_; }
  const Buffer& velocity() const { return y_[0]; }

  // The rollouts to come go through the grid `s`. An engine may compile here.
  void set(const std::vector<double>& s) {
    while (times_.size() < s.size()) times_.push_back(graph_->empty("s", dims_));
    for (std::size_t j = 0; j < s.size(); ++j) times_[j].fill(static_cast<float>(s[j]));
    inner_ = s.size() - 1;
    for (std::size_t j = inner_; j > 0; --j) bind(j);
  }

  // The step from s_j to s_{j-1}. It reads one y and writes the other, so that the last one writes the velocity; the
  // first step reads the noise itself, which saves a copy.
  Step& step(std::size_t j) {
    // On the device, where a launch may hold it: there the host cannot write between two steps.
    s_.copy(times_[j]);
    r_.copy(times_[j - 1]);
    return bind(j);
  }

 private:
  Step& bind(std::size_t j) {
    const bool first = j == inner_;
    std::unique_ptr<Step>& step = steps_[first][j % 2];
    if (!step) {
      Buffers inputs = inputs_;
      inputs["y"] = first ? noise_ : y_[j % 2];
      step = graph_->bind(inputs, {{"y_next", y_[(j - 1) % 2]}});
    }
    return *step;
  }

  std::shared_ptr<LoadedGraph> graph_;
  Dims dims_;
  Buffer noise_, s_, r_, y_[2];
  Buffers inputs_;
  std::vector<Buffer> times_;  // s_0, s_1, ...
  std::size_t inner_ = 0;
  std::unique_ptr<Step> steps_[2][2];
};

// TMD's sampler (arXiv 2601.09881, Algorithm 1, with the sign of Eq. 13 corrected).
class TmdLoop : public Loop {
 public:
  TmdLoop(const Manifest& manifest, const Graphs& graphs, const Settings& settings, std::int64_t tokens)
      : sampler_(static_cast<const TmdSampler&>(*manifest.sampler)),
        rule_(find_rule(sampler_.rule)),
        embeds_count_(static_cast<std::size_t>(tokens * manifest.text.dim)),
        launches_(graphs.backbone),
        bound_(*graphs.backbone, manifest, settings, tokens),
        inner_(graphs.flow_head, bound_),
        updater_(graphs.update, bound_.x, bound_.dims),
        update_(updater_.bind(inner_.velocity())) {
    inner_.set(shift_grid(settings.inner_steps, sampler_.inner_shift, sampler_.t_max));
  }

  Denoised run(const Start& start, const Settings& settings, Progress& progress) override {
    const std::int64_t outer = settings.steps, inner = settings.inner_steps;
    const std::vector<double> t = shift_grid(outer, sampler_.shift, sampler_.t_max);
    const std::vector<double> falling(t.rbegin(), t.rend());  // as a rule counts times
    inner_.set(shift_grid(inner, sampler_.inner_shift, sampler_.t_max));
    Calls backbone(progress, TMD_STAGE_BACKBONE, outer), flow_head(progress, TMD_STAGE_FLOW_HEAD, outer * inner);
    Draws draws(settings.seed, settings.latents_count(), progress);

    const Piece transition = [&](const Call& call) {
      call(backbone, *bound_.step, true);  // x, t, prompt_embeds -> features, context
      for (auto j = static_cast<std::size_t>(inner); j > 0; --j)
        call(flow_head, inner_.step(j), true);  // y(s_j) -> y(s_{j-1})
      call(flow_head, *update_, false);         // x - (t_i - t_{i-1}) y
    };

    bound_.prompt_embeds.write(start.embeds, embeds_count_);
    draws.into(bound_.x);
    for (auto i = static_cast<std::size_t>(outer); i > 0; --i) {
      bound_.times["t"].fill(static_cast<float>(t[i]));
      draws.into(inner_.noise());
      updater_.set(rule_(falling, static_cast<std::size_t>(outer) - i), t[i]);
      launches_.run({&backbone, &flow_head}, transition, inner);
      updater_.check(bound_.passed);
      if (start.on_preview && i > 1) start.on_preview(updater_.preview().data());
    }
    return {bound_.x.read<float>(settings.latents_count()), {}};
  }

 private:
  TmdSampler sampler_;
  Rule rule_;
  std::size_t embeds_count_;
  Launches launches_;
  BoundBackbone bound_;
  InnerFlow inner_;
  Updater updater_;
  std::unique_ptr<Step> update_;
};

class Tmd : public RuntimeFamily {
 public:
  const char* name() const override { return "tmd"; }

  std::shared_ptr<ModelInfo> read_model(Object& object) const override {
    object.need("fusion").one_of({"gated", "concat"});
    return std::make_shared<ModelInfo>();
  }

  std::shared_ptr<const SamplerInfo> read_sampler(Object& object) const override {
    const auto sampler = std::make_shared<TmdSampler>();
    sampler->rule = object.need("rule").one_of({"euler"});
    const Field steps = object.need("steps"), inner = object.need("inner_steps");
    sampler->steps = read_steps(steps);
    sampler->inner_steps = read_steps(inner);
    sampler->allowed_steps = read_allowed_steps(object.need("allowed_steps"), 64, steps, sampler->steps);
    sampler->allowed_inner_steps =
        read_allowed_steps(object.need("allowed_inner_steps"), 64, inner, sampler->inner_steps);
    sampler->shift = object.need("shift").number(1, 1000);
    sampler->inner_shift = object.need("inner_shift").number(1, 1000);
    sampler->t_max = object.need("t_max").number(0, 1, false);
    return sampler;
  }

  // A student does the counts that it was distilled for, without guidance.
  void resolve(const Manifest& manifest, const tmd_run_options& options, Settings& settings) const override {
    const auto refuse = [](const char* what) {
      refuse_usage(std::string("this model is a TMD student, which takes no ") + what +
                   ": it was trained without. Leave it out.");
    };
    refuse_jumps(options);
    if (options.guidance >= 0 && options.guidance != 1) refuse("guidance");
    if (options.negative_prompt) refuse("negative prompt");
    if (options.shift >= 0) refuse("shift");
    const auto& sampler = static_cast<const TmdSampler&>(*manifest.sampler);
    settings.steps = choose_steps(sampler, options.steps);
    settings.inner_steps = choose_inner_steps(sampler, options.inner_steps);
    shift_grid(settings.steps, sampler.shift, sampler.t_max);
    shift_grid(settings.inner_steps, sampler.inner_shift, sampler.t_max);
  }

  std::unique_ptr<Loop> make_loop(const Manifest& manifest, Graphs graphs, const Settings& settings,
                                  std::int64_t tokens) const override {
    return std::make_unique<TmdLoop>(manifest, graphs, settings, tokens);
  }
};

}  // namespace

const RuntimeFamily& tmd_family() {
  static const Tmd family;
  return family;
}

}  // namespace tmd::internal
