#include "sampling/wan.hpp"

#include "sampling/noise.hpp"
#include "sampling/rules.hpp"
#include "sampling/schedule.hpp"

namespace tmd::internal {
namespace {

// Buffer of one prompt, the two graphs behind it, and where they leave its velocity.
struct Pass {
  Buffer prompt, velocity;
  std::unique_ptr<Step> backbone, flow_head;
};

class VelocityLoop : public Loop, private LoopBuffers {
 public:
  VelocityLoop(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone, std::shared_ptr<LoadedGraph> flow_head,
               const Settings& settings, std::int64_t tokens)
      : LoopBuffers(manifest, std::move(backbone), std::move(flow_head), settings, tokens),
        sampler_(manifest.sampler),
        rule_(make_rule(manifest.sampler.rule)) {
    passes_.push_back(bind_pass());
  }

  std::vector<double> run(const Start& start, const Settings& settings, Progress& progress, float* latents) override {
    const bool guided = start.negative != nullptr;
    const std::size_t count = x_.count(), passes = guided ? 2 : 1;
    if (passes_.size() < passes) passes_.push_back(bind_pass());
    NoiseStream stream(static_cast<std::uint64_t>(settings.seed));
    const Stopwatch noise;
    put_prompt(passes_[0].prompt, start.embeds);
    if (guided) put_prompt(passes_[1].prompt, start.negative);
    float* x = x_.as<float>();
    stream.normal(x, count);
    if (sampler_.init_scale != 1) {
      const float factor = static_cast<float>(sampler_.init_scale);
      for (std::size_t k = 0; k < count; ++k) x[k] = x[k] * factor;
    }
    x_.upload();
    rule_->start(settings.times, count, &stream);
    progress.add(TMD_STAGE_NOISE, noise.seconds());
    const auto each = static_cast<std::int64_t>(passes);
    for (std::int64_t i = 0; i < settings.steps; ++i) {
      const auto at = static_cast<std::size_t>(i);
      t_.fill(static_cast<float>(told_time(settings.times[at], sampler_.time_rounding)));
      for (std::int64_t number = 1; number <= each; ++number)
        run_pass(passes_[static_cast<std::size_t>(number - 1)], i * each + number, settings.steps * each, progress);
      const Stopwatch update;
      for (std::size_t pass = 0; pass < passes; ++pass) passes_[pass].velocity.download();
      float* v = passes_[0].velocity.as<float>();
      if (guided) guide(v, passes_[1].velocity.as<float>(), static_cast<float>(settings.guidance), count);
      double spent = 0;  // in the preview
      if (start.on_preview && i + 1 < settings.steps) {
        const Stopwatch preview;
        start.on_preview(data_estimate(v, settings.times[at]).data());
        spent = preview.seconds();
      }
      rule_->step(at, x, v);
      x_.upload();
      progress.add(rule_->draws() ? TMD_STAGE_NOISE : TMD_STAGE_FLOW_HEAD, update.seconds() - spent);
      check_finite(TMD_STAGE_FLOW_HEAD, x, count);
    }
    std::memcpy(latents, x, x_.bytes());
    return {};
  }

 private:
  // v_neg + guidance (v - v_neg), into v: three roundings.
  static void guide(float* v, const float* negative, float guidance, std::size_t count) {
    for (std::size_t k = 0; k < count; ++k) {
      const float difference = v[k] - negative[k];
      const float scaled = difference * guidance;
      v[k] = scaled + negative[k];
    }
  }

  void run_pass(Pass& pass, std::int64_t done, std::int64_t total, Progress& progress) {
    for (const tmd_stage stage : {TMD_STAGE_BACKBONE, TMD_STAGE_FLOW_HEAD}) {
      const Stopwatch step;
      (stage == TMD_STAGE_BACKBONE ? pass.backbone : pass.flow_head)->run();
      if (stage == TMD_STAGE_BACKBONE) check_features();
      const double seconds = step.seconds();
      progress.add(stage, seconds);
      progress.report(stage, done, total, seconds);
    }
  }

  Pass bind_pass() {
    Pass pass;
    pass.prompt = backbone_graph_->empty("prompt_embeds", dims_);
    pass.velocity = flow_head_graph_->empty("velocity", dims_);
    pass.backbone = backbone_graph_->bind(
        {{"x", x_}, {"t", t_}, {"prompt_embeds", pass.prompt}, {"rope_cos", rope_cos_}, {"rope_sin", rope_sin_}},
        {{"features", features_}, {"context", context_}});
    pass.flow_head = flow_head_graph_->bind({{"x", x_},
                                             {"t", t_},
                                             {"features", features_},
                                             {"context", context_},
                                             {"rope_cos", rope_cos_},
                                             {"rope_sin", rope_sin_}},
                                            {{"velocity", pass.velocity}});
    return pass;
  }

  SamplerInfo sampler_;
  std::unique_ptr<Rule> rule_;
  std::vector<Pass> passes_;
};

}  // namespace

std::unique_ptr<Loop> make_velocity_loop(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone,
                                         std::shared_ptr<LoadedGraph> flow_head, const Settings& settings,
                                         std::int64_t tokens) {
  return std::make_unique<VelocityLoop>(manifest, std::move(backbone), std::move(flow_head), settings, tokens);
}

}  // namespace tmd::internal
