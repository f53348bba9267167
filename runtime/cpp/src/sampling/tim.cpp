#include "sampling/tim.hpp"

#include <cmath>

#include "sampling/deadline.hpp"
#include "sampling/noise.hpp"
#include "sampling/schedule.hpp"

namespace tmd::internal {
namespace {

// Both graphs bound to buffers of 1 row, or of 2 with guidance, whose x stay equal.
struct Rows {
  Buffer asked, x, t, r, guidance, x_next;
  std::unique_ptr<Step> make_context, step;
};

class TransitionLoop : public Loop {
 public:
  TransitionLoop(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone,
                 std::shared_ptr<LoadedGraph> flow_head, const Settings& settings, std::int64_t tokens)
      : backbone_graph_(std::move(backbone)),
        flow_head_graph_(std::move(flow_head)),
        classes_(manifest.model.classes),
        count_(static_cast<std::size_t>(settings.channels * settings.latent_height * settings.latent_width)),
        embeds_count_(static_cast<std::size_t>(tokens * manifest.text.dim)) {
    const std::int64_t grid[2] = {settings.latent_height / manifest.model.patch_size[1],
                                  settings.latent_width / manifest.model.patch_size[2]};
    dims_ = {{"batch", 1},
             {"height", settings.latent_height},
             {"width", settings.latent_width},
             {"tokens", grid[0] * grid[1]},
             {"text", tokens}};
    rope_cos_ = flow_head_graph_->empty("rope_cos", dims_);
    rope_sin_ = flow_head_graph_->empty("rope_sin", dims_);
    const auto table = static_cast<std::size_t>(grid[0] * grid[1] * (manifest.model.head_dim / 2));
    for (const Buffer* buffer : {&rope_cos_, &rope_sin_}) check(*buffer, DType::f32, table);
    tim_rope_tables(grid[0], grid[1], manifest.model.head_dim, manifest.model.rope, rope_cos_.as<float>(),
                    rope_sin_.as<float>());
    rope_cos_.upload();
    rope_sin_.upload();
  }

  std::vector<double> run(const Start& start, const Settings& settings, Progress& progress, float* latents) override {
    const auto rows_at = [&](double time) { return settings.guided(time) ? std::size_t{2} : std::size_t{1}; };
    bool needed[2] = {false, false};
    for (std::size_t k = 0; k + 1 < settings.times.size(); ++k) needed[rows_at(settings.times[k]) - 1] = true;
    for (const std::size_t rows : {std::size_t{1}, std::size_t{2}})
      if (needed[rows - 1]) bind(rows, progress);
    const Stopwatch begun;
    double t = settings.times.front();
    NoiseStream stream(static_cast<std::uint64_t>(settings.seed));
    std::vector<float> x(count_);
    stream.normal(x.data(), count_);
    if (start.picture) blend(x, start.picture, t);
    progress.add(TMD_STAGE_NOISE, begun.seconds());

    double backbone = 0;
    for (const std::size_t rows : {std::size_t{1}, std::size_t{2}})
      if (needed[rows - 1]) backbone += ask(rows, start, settings);
    progress.add(TMD_STAGE_BACKBONE, backbone);
    progress.report(TMD_STAGE_BACKBONE, 1, 1, backbone);

    double end = settings.deadline.value_or(0);
    if (settings.deadline) end += measure(needed, *settings.deadline, progress);
    const auto dearest = [&] {
      double most = 0;
      for (std::size_t k = 0; k < 2; ++k)
        if (needed[k]) most = std::max(most, costs_[k].cost());
      return most;
    };
    std::vector<double> way = {t};
    for (std::int64_t done = 1, told = settings.steps, most = settings.steps; t > 0; ++done, --most) {
      const std::size_t rows = rows_at(t);
      const double r = settings.deadline ? next_time(settings.times, settings.scheduled, t, most, end - begun.seconds(),
                                                     costs_[rows - 1].cost(), dearest())
                                         : settings.times[static_cast<std::size_t>(done)];
      if (start.on_preview && r > 0) preview(start, x, t, rows, progress);
      const Stopwatch step;
      const float* moved = jump(x, t, r, rows);
      const bool fresh = settings.rho > 0 && way.size() > 1 && r > 0;
      if (fresh) {
        renew(x, moved, t, r, settings.rho, stream);
      } else {
        std::memcpy(x.data(), moved, count_ * sizeof(float));
      }
      const double seconds = step.seconds();
      costs_[rows - 1].add(seconds);
      check_finite(TMD_STAGE_FLOW_HEAD, x.data(), count_);
      way.push_back(r);
      progress.add(TMD_STAGE_FLOW_HEAD, seconds);
      const bool planned = settings.deadline && !settings.scheduled;
      const std::int64_t ahead = r <= 0 ? 0 : planned ? std::llround(r / (t - r)) : settings.steps - done;
      progress.expect(done + ahead - told);
      told = done + ahead;
      progress.report(TMD_STAGE_FLOW_HEAD, done, told, seconds);
      t = r;
    }
    std::memcpy(latents, x.data(), count_ * sizeof(float));
    return way;
  }

 private:
  static void check(const Buffer& buffer, DType dtype, std::size_t count) {
    if (buffer.dtype() != dtype || buffer.count() != count)
      fail_run("a graph of this bundle has tensors of another size or type than its manifest says. Export it again.");
  }

  // The buffers of so many rows; an engine may compile for them here.
  void bind(std::size_t rows, Progress& progress) {
    if (rows_[rows - 1].step) return;
    const Stopwatch load;
    Rows made;
    Dims dims = dims_;
    dims["batch"] = static_cast<std::int64_t>(rows);
    const std::string asked = classes_ ? "labels" : "prompt_embeds";
    made.asked = backbone_graph_->empty(asked, dims);
    check(made.asked, classes_ ? DType::i64 : DType::f32, rows * (classes_ ? 1 : embeds_count_));
    const Buffer context = backbone_graph_->empty("context", dims);
    made.make_context = backbone_graph_->bind({{asked, made.asked}}, {{"context", context}});
    const std::pair<const char*, Buffer*> inputs[] = {
        {"x", &made.x}, {"t", &made.t}, {"r", &made.r}, {"guidance", &made.guidance}, {"x_next", &made.x_next}};
    for (const auto& [name, buffer] : inputs) *buffer = flow_head_graph_->empty(name, dims);
    for (const Buffer* buffer : {&made.x, &made.x_next}) check(*buffer, DType::f32, rows * count_);
    for (const Buffer* buffer : {&made.t, &made.r}) check(*buffer, DType::f32, rows);
    check(made.guidance, DType::f32, rows * rows);
    made.step = flow_head_graph_->bind({{"x", made.x},
                                        {"t", made.t},
                                        {"r", made.r},
                                        {"guidance", made.guidance},
                                        {"context", context},
                                        {"rope_cos", rope_cos_},
                                        {"rope_sin", rope_sin_}},
                                       {{"x_next", made.x_next}});
    rows_[rows - 1] = std::move(made);
    progress.add(TMD_STAGE_LOAD, load.seconds());
  }

  // What the flow head needs of the prompt, and how the rows mix. Returns the seconds.
  double ask(std::size_t rows, const Start& start, const Settings& settings) {
    Rows& at = rows_[rows - 1];
    const Stopwatch asking;
    if (classes_) {
      at.asked.as<std::int64_t>()[0] = settings.label;
      if (rows == 2) at.asked.as<std::int64_t>()[1] = classes_;  // the number of none
    } else {
      std::memcpy(at.asked.data(), start.embeds, embeds_count_ * sizeof(float));
      if (rows == 2) std::memcpy(at.asked.as<float>() + embeds_count_, start.negative, embeds_count_ * sizeof(float));
    }
    float* mix = at.guidance.as<float>();
    mix[0] = 1;
    if (rows == 2) {
      mix[0] = mix[2] = static_cast<float>(settings.guidance);
      mix[1] = mix[3] = static_cast<float>(1 - settings.guidance);
    }
    at.asked.upload();
    at.guidance.upload();
    at.make_context->run();
    return asking.seconds();
  }

  // Seconds that went into steps whose time was not known. They count as loading: only a first run has them.
  double measure(const bool (&needed)[2], double deadline, Progress& progress) {
    const Stopwatch all;
    const std::vector<float> zeros(count_);
    const auto cost = [&](std::size_t rows) {
      const Stopwatch step;
      jump(zeros, 1.0, 0.0, rows);
      return step.seconds();
    };
    for (std::size_t rows = 1; rows <= 2; ++rows) {
      if (!needed[rows - 1] || costs_[rows - 1].known()) continue;
      const double first = cost(rows);
      // The very first one may be slow for reasons that do not come back, and here it would decide.
      costs_[rows - 1].add(first > deadline / 10 ? cost(rows) : first);
    }
    progress.add(TMD_STAGE_LOAD, all.seconds());
    return all.seconds();
  }

  // x at r; valid until the next jump.
  const float* jump(const std::vector<float>& x, double t, double r, std::size_t rows) {
    Rows& at = rows_[rows - 1];
    for (std::size_t row = 0; row < rows; ++row)
      std::memcpy(at.x.as<float>() + row * count_, x.data(), count_ * sizeof(float));
    at.x.upload();
    at.t.fill(static_cast<float>(t));
    at.r.fill(static_cast<float>(r));
    at.step->run();
    at.x_next.download();
    return at.x_next.as<float>();
  }

  void preview(const Start& start, const std::vector<float>& x, double t, std::size_t rows, Progress& progress) {
    const Stopwatch step;
    const float* end = jump(x, t, 0.0, rows);
    const std::vector<float> shown(end, end + count_);
    progress.add(TMD_STAGE_FLOW_HEAD, step.seconds());
    start.on_preview(shown.data());
  }

  // Each product and each sum is rounded to float, in Python's order, here and in `renew`.
  static void blend(std::vector<float>& x, const float* picture, double t) {
    const auto of_noise = static_cast<float>(t), of_picture = static_cast<float>(1 - t);
    for (std::size_t k = 0; k < x.size(); ++k) {
      const float noise = of_noise * x[k], kept = of_picture * picture[k];
      x[k] = noise + kept;
    }
  }

  // From `moved` = x - (t - r)F: less rho (t - r) of the noise that F sees in x, x + (1 - t)F, and plus
  // sqrt(2 rho t (t - r)) of fresh noise.
  void renew(std::vector<float>& x, const float* moved, double t, double r, double rho, NoiseStream& stream) {
    std::vector<float> noise(count_);
    stream.normal(noise.data(), count_);
    const auto of_x = static_cast<float>(t - r), of_step = static_cast<float>(1 - t), less = static_cast<float>(rho);
    const auto more = static_cast<float>(std::pow(2 * rho * t * (t - r), 0.5));
    for (std::size_t k = 0; k < count_; ++k) {
      const float step = x[k] - moved[k], first = of_x * x[k], second = of_step * step;
      const float seen = first + second;
      const float taken = less * seen, given = more * noise[k];
      x[k] = (moved[k] - taken) + given;
    }
  }

  std::shared_ptr<LoadedGraph> backbone_graph_, flow_head_graph_;
  std::int64_t classes_;
  std::size_t count_, embeds_count_;
  Dims dims_;
  Buffer rope_cos_, rope_sin_;
  Rows rows_[2];
  StepTimes costs_[2];
};

}  // namespace

std::unique_ptr<Loop> make_transition_loop(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone,
                                           std::shared_ptr<LoadedGraph> flow_head, const Settings& settings,
                                           std::int64_t tokens) {
  return std::make_unique<TransitionLoop>(manifest, std::move(backbone), std::move(flow_head), settings, tokens);
}

}  // namespace tmd::internal
