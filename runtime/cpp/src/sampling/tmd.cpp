// TMD's own rule, `transition`: the flow head runs several times on the features of one backbone pass.
#include "sampling/loop.hpp"

#include "sampling/noise.hpp"
#include "sampling/schedule.hpp"
#include "sampling/tim.hpp"
#include "sampling/wan.hpp"

namespace tmd::internal {
namespace {

class DenoiseLoop : public Loop, private LoopBuffers {
 public:
  DenoiseLoop(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone, std::shared_ptr<LoadedGraph> flow_head,
              const Settings& settings, std::int64_t tokens)
      : LoopBuffers(manifest, std::move(backbone), std::move(flow_head), settings, tokens), sampler_(manifest.sampler) {
    prompt_ = backbone_graph_->empty("prompt_embeds", dims_);
    backbone_ = backbone_graph_->bind(
        {{"x", x_}, {"t", t_}, {"prompt_embeds", prompt_}, {"rope_cos", rope_cos_}, {"rope_sin", rope_sin_}},
        {{"features", features_}, {"context", context_}});
    noise_ = flow_head_graph_->empty("noise", dims_);
    s_ = flow_head_graph_->empty("s", dims_);
    r_ = flow_head_graph_->empty("r", dims_);
    for (Buffer& y : y_) y = flow_head_graph_->empty("y_next", dims_);
    for (std::size_t way = 0; way < 3; ++way) turns_[way] = bind_turn(way, s_, r_);
  }

  std::vector<double> run(const Start& start, const Settings& settings, Progress& progress, float* latents) override {
    const std::int64_t outer = settings.steps, inner = settings.inner_steps;
    const std::vector<double> t = shift_grid(outer, sampler_.shift, sampler_.t_max);
    const std::vector<double> s = shift_grid(inner, sampler_.inner_shift, sampler_.t_max);
    NoiseStream stream(static_cast<std::uint64_t>(settings.seed));
    const Stopwatch first_noise;
    put_prompt(prompt_, start.embeds);
    draw(x_, stream, progress, first_noise);
    for (std::int64_t i = outer; i > 0; --i) {
      const auto at = static_cast<std::size_t>(i);
      t_.fill(static_cast<float>(t[at]));
      if (recording_ && recording_->turns.size() == static_cast<std::size_t>(inner)) {
        draw(noise_, stream, progress, Stopwatch());
        launch(outer - i, outer, progress);
      } else {
        const double backbone = run_backbone(outer - i, outer, progress);
        draw(noise_, stream, progress, Stopwatch());
        const double flow_head = transition(s, (outer - i) * inner, outer * inner, progress);
        if (features_.on_device()) record(s, backbone / (backbone + flow_head));
      }
      const Buffer& y = y_[static_cast<std::size_t>(inner - 1) % 2];
      const Stopwatch crossing;
      y.download();
      progress.add(TMD_STAGE_FLOW_HEAD, crossing.seconds());
      if (start.on_preview && i > 1) start.on_preview(data_estimate(y.as<float>(), t[at]).data());
      update(y, static_cast<float>(t[at] - t[at - 1]), progress);
    }
    std::memcpy(latents, x_.data(), x_.bytes());
    return {};
  }

 private:
  // An outer step that the engine keeps as one launch; the backbone takes `share` of its time.
  struct Recording {
    std::vector<std::unique_ptr<Step>> turns;  // each with times of its own
    std::unique_ptr<Step> launch;
    double share = 0;
  };

  // The flow head reads one y and writes the other (ways 1 and 2); its first step (way 0) reads the noise itself, which
  // saves a copy.
  static std::size_t way_of(std::size_t inner_step) { return inner_step ? (inner_step - 1) % 2 + 1 : 0; }

  std::unique_ptr<Step> bind_turn(std::size_t way, const Buffer& s, const Buffer& r) {
    return flow_head_graph_->bind({{"y", way ? y_[way - 1] : noise_},
                                   {"noise", noise_},
                                   {"s", s},
                                   {"r", r},
                                   {"features", features_},
                                   {"context", context_},
                                   {"rope_cos", rope_cos_},
                                   {"rope_sin", rope_sin_}},
                                  {{"y_next", y_[way % 2]}});
  }

  static void draw(const Buffer& to, NoiseStream& stream, Progress& progress, const Stopwatch& since) {
    stream.normal(to.as<float>(), to.count());
    to.upload();
    progress.add(TMD_STAGE_NOISE, since.seconds());
  }

  double run_backbone(std::int64_t done, std::int64_t total, Progress& progress) {
    const Stopwatch step;
    backbone_->run();
    check_features();
    const double seconds = step.seconds();
    progress.add(TMD_STAGE_BACKBONE, seconds);
    progress.report(TMD_STAGE_BACKBONE, done + 1, total, seconds);
    return seconds;
  }

  // The inner flow of one outer step; the last y that it writes holds the velocity.
  double transition(const std::vector<double>& s, std::int64_t done, std::int64_t total, Progress& progress) {
    const std::size_t inner = s.size() - 1;
    double all = 0;
    for (std::size_t k = 0; k < inner; ++k) {
      const Stopwatch step;
      s_.fill(static_cast<float>(s[inner - k]));
      r_.fill(static_cast<float>(s[inner - k - 1]));
      turns_[way_of(k)]->run();
      const double seconds = step.seconds();
      all += seconds;
      progress.add(TMD_STAGE_FLOW_HEAD, seconds);
      progress.report(TMD_STAGE_FLOW_HEAD, done + static_cast<std::int64_t>(k) + 1, total, seconds);
    }
    return all;
  }

  void record(const std::vector<double>& s, double share) {
    auto made = std::make_unique<Recording>();
    made->share = share;
    const std::size_t inner = s.size() - 1;
    for (std::size_t k = 0; k < inner; ++k) {
      const Buffer from = flow_head_graph_->empty("s", dims_), to = flow_head_graph_->empty("r", dims_);
      from.fill(static_cast<float>(s[inner - k]));
      to.fill(static_cast<float>(s[inner - k - 1]));
      made->turns.push_back(bind_turn(way_of(k), from, to));
    }
    recording_.reset();
    made->launch = backbone_graph_->record([&] {
      backbone_->run();
      for (const auto& turn : made->turns) turn->run();
    });
    if (made->launch) recording_ = std::move(made);
  }

  void launch(std::int64_t done, std::int64_t outer, Progress& progress) {
    const Stopwatch step;
    recording_->launch->run();
    check_features();
    const double seconds = step.seconds(), backbone = seconds * recording_->share;
    const auto inner = static_cast<std::int64_t>(recording_->turns.size());
    progress.add(TMD_STAGE_BACKBONE, backbone);
    progress.add(TMD_STAGE_FLOW_HEAD, seconds - backbone);
    // Every step is told, so that the fraction is right; a stop takes effect here, after all of them.
    progress.report(TMD_STAGE_BACKBONE, done + 1, outer, backbone);
    for (std::int64_t k = 1; k <= inner; ++k)
      progress.report(TMD_STAGE_FLOW_HEAD, done * inner + k, outer * inner,
                      (seconds - backbone) / static_cast<double>(inner));
  }

  void update(const Buffer& y, float width, Progress& progress) {
    const Stopwatch update;
    float* x = x_.as<float>();
    const float* velocity = y.as<float>();
    // Two roundings, as in Python: the product is a float before it is subtracted.
    for (std::size_t k = 0; k < x_.count(); ++k) {
      const float product = velocity[k] * width;
      x[k] = x[k] - product;
    }
    x_.upload();
    check_finite(TMD_STAGE_FLOW_HEAD, x, x_.count());
    progress.add(TMD_STAGE_FLOW_HEAD, update.seconds());
  }

  SamplerInfo sampler_;
  Buffer prompt_, noise_, s_, r_, y_[2];
  std::unique_ptr<Step> backbone_, turns_[3];
  std::unique_ptr<Recording> recording_;
};

}  // namespace

LoopBuffers::LoopBuffers(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone,
                         std::shared_ptr<LoadedGraph> flow_head, const Settings& settings, std::int64_t tokens)
    : backbone_graph_(std::move(backbone)),
      flow_head_graph_(std::move(flow_head)),
      embeds_count_(static_cast<std::size_t>(tokens * manifest.text.dim)) {
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
  rope_cos_.upload();
  rope_sin_.upload();
}

std::vector<float> LoopBuffers::data_estimate(const float* v, double t) const {
  const auto factor = static_cast<float>(t);
  const float* x = x_.as<float>();
  std::vector<float> data(x_.count());
  for (std::size_t k = 0; k < data.size(); ++k) {
    const float product = factor * v[k];
    data[k] = x[k] - product;
  }
  return data;
}

void LoopBuffers::put_prompt(const Buffer& prompt, const float* embeds) const {
  if (prompt.dtype() != DType::f32 || prompt.count() != embeds_count_)
    fail_run("the backbone of this bundle takes other embeddings than its manifest says. Export it again.");
  std::memcpy(prompt.data(), embeds, prompt.bytes());
  prompt.upload();
}

void LoopBuffers::check_features() const {
  if (!features_.on_device()) check_finite(TMD_STAGE_BACKBONE, features_.as<float>(), features_.count());
}

std::unique_ptr<Loop> make_loop(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone,
                                std::shared_ptr<LoadedGraph> flow_head, const Settings& settings, std::int64_t tokens) {
  if (manifest.model.kind == "tim")
    return make_transition_loop(manifest, std::move(backbone), std::move(flow_head), settings, tokens);
  if (manifest.sampler.rule != "transition")
    return make_velocity_loop(manifest, std::move(backbone), std::move(flow_head), settings, tokens);
  return std::make_unique<DenoiseLoop>(manifest, std::move(backbone), std::move(flow_head), settings, tokens);
}

}  // namespace tmd::internal
