// TMD's own rule, `transition`: the flow head runs several times on the features of one backbone pass.
#include "loop.hpp"

#include "noise.hpp"
#include "schedule.hpp"
#include "velocity_loop.hpp"

namespace tmd::internal {
namespace {

class TransitionLoop : public Loop, private LoopBuffers {
 public:
  TransitionLoop(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone,
                 std::shared_ptr<LoadedGraph> flow_head, const Settings& settings, std::int64_t tokens)
      : LoopBuffers(manifest, std::move(backbone), std::move(flow_head), settings, tokens), sampler_(manifest.sampler) {
    prompt_ = backbone_graph_->empty("prompt_embeds", dims_);
    backbone_ = backbone_graph_->bind(
        {{"x", x_}, {"t", t_}, {"prompt_embeds", prompt_}, {"rope_cos", rope_cos_}, {"rope_sin", rope_sin_}},
        {{"features", features_}, {"context", context_}});
    noise_ = flow_head_graph_->empty("noise", dims_);
    s_ = flow_head_graph_->empty("s", dims_);
    r_ = flow_head_graph_->empty("r", dims_);
    // The flow head reads one y and writes the other; its first step reads the noise itself, which saves a copy.
    for (Buffer& y : y_) y = flow_head_graph_->empty("y_next", dims_);
    start_ = bind_turn(noise_, y_[0]);
    turns_[0] = bind_turn(y_[0], y_[1]);
    turns_[1] = bind_turn(y_[1], y_[0]);
  }

  void run(const float* embeds, const float*, const Settings& settings, Progress& progress, float* latents) override {
    const std::int64_t outer = settings.steps, inner = settings.inner_steps;
    const std::vector<double> t = shift_grid(outer, sampler_.shift, sampler_.t_max);
    const std::vector<double> s = shift_grid(inner, sampler_.inner_shift, sampler_.t_max);
    NoiseStream stream(static_cast<std::uint64_t>(settings.seed));
    const Stopwatch first_noise;
    put_prompt(prompt_, embeds);
    stream.normal(x_.as<float>(), x_.count());
    progress.add(TMD_STAGE_NOISE, first_noise.seconds());
    for (std::int64_t i = outer; i > 0; --i) {
      const auto at = static_cast<std::size_t>(i);
      const Stopwatch outer_step;
      t_.fill(static_cast<float>(t[at]));
      backbone_->run();
      check_finite(TMD_STAGE_BACKBONE, features_.as<float>(), features_.count());
      const double seconds = outer_step.seconds();
      progress.add(TMD_STAGE_BACKBONE, seconds);
      progress.report(TMD_STAGE_BACKBONE, outer - i + 1, outer, seconds);

      const Stopwatch noise;
      stream.normal(noise_.as<float>(), noise_.count());
      progress.add(TMD_STAGE_NOISE, noise.seconds());
      const Buffer& y = transition(s, (outer - i) * inner, outer * inner, progress);
      const Stopwatch update;
      // Two roundings, as in Python: the product is a float before it is subtracted.
      const float width = static_cast<float>(t[at] - t[at - 1]);
      for (std::size_t k = 0; k < x_.count(); ++k) {
        const float product = y.as<float>()[k] * width;
        x_.as<float>()[k] = x_.as<float>()[k] - product;
      }
      check_finite(TMD_STAGE_FLOW_HEAD, x_.as<float>(), x_.count());
      progress.add(TMD_STAGE_FLOW_HEAD, update.seconds());
    }
    std::memcpy(latents, x_.data(), x_.bytes());
  }

 private:
  std::unique_ptr<Step> bind_turn(const Buffer& y, const Buffer& y_next) {
    return flow_head_graph_->bind({{"y", y},
                                   {"noise", noise_},
                                   {"s", s_},
                                   {"r", r_},
                                   {"features", features_},
                                   {"context", context_},
                                   {"rope_cos", rope_cos_},
                                   {"rope_sin", rope_sin_}},
                                  {{"y_next", y_next}});
  }

  // The inner flow of one outer step; returns the buffer that holds the velocity y.
  const Buffer& transition(const std::vector<double>& s, std::int64_t done, std::int64_t total, Progress& progress) {
    const std::size_t inner = s.size() - 1;
    for (std::size_t k = 0; k < inner; ++k) {
      const Stopwatch step;
      s_.fill(static_cast<float>(s[inner - k]));
      r_.fill(static_cast<float>(s[inner - k - 1]));
      (k ? turns_[(k - 1) % 2] : start_)->run();
      const double seconds = step.seconds();
      progress.add(TMD_STAGE_FLOW_HEAD, seconds);
      progress.report(TMD_STAGE_FLOW_HEAD, done + static_cast<std::int64_t>(k) + 1, total, seconds);
    }
    return y_[(inner - 1) % 2];
  }

  SamplerInfo sampler_;
  Buffer prompt_, noise_, s_, r_, y_[2];
  std::unique_ptr<Step> backbone_, start_, turns_[2];
};

}  // namespace

LoopBuffers::LoopBuffers(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone,
                         std::shared_ptr<LoadedGraph> flow_head, const Settings& settings, std::int64_t tokens)
    : backbone_graph_(std::move(backbone)), flow_head_graph_(std::move(flow_head)) {
  const std::int64_t grid[3] = {settings.latent_frames / manifest.model.patch_size[0],
                                settings.latent_height / manifest.model.patch_size[1],
                                settings.latent_width / manifest.model.patch_size[2]};
  dims_ = {{"batch", 1},
           {"frames", settings.latent_frames},
           {"height", settings.latent_height},
           {"width", settings.latent_width},
           {"tokens", grid[0] * grid[1] * grid[2]},
           {"text", tokens}};
  x_ = backbone_graph_->empty("x", dims_);
  t_ = backbone_graph_->empty("t", dims_);
  rope_cos_ = backbone_graph_->empty("rope_cos", dims_);
  rope_sin_ = backbone_graph_->empty("rope_sin", dims_);
  features_ = backbone_graph_->empty("features", dims_);
  context_ = backbone_graph_->empty("context", dims_);
  const std::size_t table = static_cast<std::size_t>(dims_["tokens"] * (manifest.model.head_dim / 2));
  for (const Buffer* buffer : {&x_, &t_, &rope_cos_, &rope_sin_, &features_})
    if (buffer->dtype() != DType::f32)
      fail_run("a graph of this bundle has tensors that are not float32. Export it again.");
  if (rope_cos_.count() != table || rope_sin_.count() != table)
    fail_run("the rotary tables of this bundle's graphs have another size than its manifest says. Export it again.");
  rope_tables(grid, manifest.model.head_dim, rope_cos_.as<float>(), rope_sin_.as<float>());
}

void LoopBuffers::put_prompt(const Buffer& prompt, const float* embeds) const {
  std::memcpy(prompt.data(), embeds, prompt.bytes());
}

std::unique_ptr<Loop> make_loop(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone,
                                std::shared_ptr<LoadedGraph> flow_head, const Settings& settings, std::int64_t tokens) {
  if (manifest.sampler.rule != "transition")
    return make_velocity_loop(manifest, std::move(backbone), std::move(flow_head), settings, tokens);
  return std::make_unique<TransitionLoop>(manifest, std::move(backbone), std::move(flow_head), settings, tokens);
}

}  // namespace tmd::internal
